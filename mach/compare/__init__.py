"""One data set, several configurations: measured alike, shown in one table and one report."""
