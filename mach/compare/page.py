"""The HTML page that a comparison's report is poured into: one file, no script, nothing loaded from elsewhere."""

from __future__ import annotations

from string import Template

STYLE = """
:root { color-scheme: light dark; --font: ui-sans-serif, system-ui, "Segoe UI", Roboto, "Helvetica Neue", "Noto Sans", sans-serif;
  --page: #fbfbfa; --card: #ffffff; --ink: #1b1f24; --muted: #59616b; --line: #d8dde3; --full: #6f7781;
  --c0: #0072b2; --c1: #c65300; --c2: #00855f; --c3: #b5588b; --c4: #a87400; --c5: #2b86bd; }
@media (prefers-color-scheme: dark) { :root {
  --page: #14171b; --card: #1c2025; --ink: #eceff2; --muted: #a5aeb8; --line: #363d45; --full: #a3abb4;
  --c0: #56a9e8; --c1: #f08a4b; --c2: #3cc598; --c3: #e39bc6; --c4: #efb53d; --c5: #8fd0f5; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.5rem 1.25rem 4rem; max-width: 66rem; background: var(--page); color: var(--ink);
  font: 16px/1.55 var(--font); }
h1 { margin: 0; font-size: 1.9rem; line-height: 1.2; letter-spacing: -.015em; text-wrap: balance; }
h2 { margin: 0 0 .15rem; font-size: 1.15rem; }
p { margin: .4rem 0; max-width: 46rem; }
.facts, figcaption, .note, footer { color: var(--muted); font-size: .92rem; }
.lead { font-size: 1.1rem; margin: 1rem 0 0; }
section, figure { margin: 1.5rem 0 0; padding: 1.1rem 1.3rem 1.2rem; background: var(--card); border: 1px solid var(--line);
  border-radius: 10px; }
.wide { overflow-x: auto; }
.chart { display: block; width: 100%; min-width: 46rem; height: auto; margin-top: .7rem; }
.chart * { stroke-linejoin: round; stroke-linecap: butt; }
table { width: 100%; border-collapse: collapse; margin-top: .6rem; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { padding: .42rem .55rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; padding-left: 0; white-space: normal; min-width: 10rem;
  overflow-wrap: anywhere; }
tbody tr:last-child > * { border-bottom: 0; }
thead th { color: var(--muted); font-weight: 500; vertical-align: bottom; white-space: normal;
  overflow-wrap: break-word; min-width: 4.2rem; }
tbody th { font-weight: 500; }
td.best { font-weight: 700; }
td small { display: block; color: var(--muted); font-weight: 400; font-size: .85em; }
.swatch { display: inline-block; width: .7rem; height: .7rem; margin-right: .5rem; border-radius: 3px; }
summary { cursor: pointer; font-weight: 600; }
footer { margin-top: 2rem; }
@media print { section, figure { break-inside: avoid; } }
"""

PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>$style</style>
</head>
<body>
<header>
<h1>$title</h1>
<p class="facts">$facts</p>
<p class="lead">$lead</p>
</header>
<main>
<section>
<h2>At a glance</h2>
<div class="wide">$table</div>
<p class="note">$note</p>
</section>
$figures
<section>
<h2>Every metric, %</h2>
<div class="wide">$metrics</div>
</section>
<section>
<h2>Settings</h2>
<div class="wide">$settings</div>
<details><summary>The same in all</summary><p class="note">$shared</p></details>
</section>
</main>
<footer>$machine</footer>
</body>
</html>
""")

FIGURE = Template("""<figure>
<h2>$title</h2>
<figcaption>$caption</figcaption>
<div class="wide">$chart</div>
</figure>
""")
