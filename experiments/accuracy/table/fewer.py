"""Keep every n-th label of XC text and the samples that name one: where the full head is dear, it can be had there.

    python experiments/accuracy/table/fewer.py geonames geonames4 --every 4

Writes train.txt, test.txt and labels.txt beside each other, features as they are. Label i of what is written is label n i.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def thin(source: Path, out: Path, every: int) -> int:
    """Copy a split with the labels that `every` divides, renumbered; give its samples."""
    with open(source) as lines:
        _, n_features, n_labels = map(int, lines.readline().split())
        kept = []
        for line in lines:
            labels, _, features = line.partition(" ")
            left = [int(label) // every for label in labels.split(",") if label and int(label) % every == 0]
            if left:
                kept.append(f"{','.join(map(str, left))} {features}")
    out.write_text(f"{len(kept)} {n_features} {-(-n_labels // every)}\n" + "".join(kept))
    return len(kept)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--every", type=int, default=4)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for split in ("train.txt", "test.txt"):
        print(f"{args.out / split}: {thin(args.data / split, args.out / split, args.every):,} samples")
    labels = (args.data / "labels.txt").read_text().splitlines(keepends=True)
    (args.out / "labels.txt").write_text("".join(labels[:: args.every]))


if __name__ == "__main__":
    main()
