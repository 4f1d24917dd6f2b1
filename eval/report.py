"""A table of many results, with pictures; or which of two results is better.

    python eval/report.py table results runs/shapes/evals --out report
    python eval/report.py compare results/knn-digits-A-12345678.json results/knn-digits-B-12345678.json

`table` reads every *.json of the folders and writes report.md, report.html (one file, pictures inside) and the
pictures. `compare` matches the two results' samples and prints what is compared, the difference, its 95 % interval and
p-value by a paired bootstrap over the test samples, McNemar's exact test, and where training images or settings differ.
"""

import argparse
import sys
from pathlib import Path

from aimv2.evals.reports.comparison import RESAMPLES, Pair, compare
from aimv2.evals.reports.pages import write_report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    table = commands.add_parser("table", help="report.md, report.html and pictures")
    table.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="of results")
    table.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    two = commands.add_parser("compare", help="two results on the same test set")
    two.add_argument("a", type=Path, metavar="A.json")
    two.add_argument("b", type=Path, metavar="B.json")
    two.add_argument("--resamples", type=int, default=RESAMPLES)
    two.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    sys.stdout.reconfigure(errors="replace")  # a terminal may not have every letter of a name
    try:
        if arguments.command == "table":
            _write_table(arguments.folders, arguments.out)
        else:
            pair = compare(arguments.a, arguments.b, resamples=arguments.resamples, seed=arguments.seed)
            print(_described(pair))
    except (ValueError, OSError, ImportError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


def _write_table(folders: list[Path], out: Path) -> None:
    report = write_report(folders, out)
    for problem in report.problems:
        sys.stderr.write(f"left out: {problem}\n")
    print(f"{report.results} results, {len(report.problems)} JSON files left out")
    print("\n".join(map(str, report.files)))


def _described(pair: Pair) -> str:
    c, lines = pair.comparison, []
    for side, value, result, quantity in zip("AB", (c.a, c.b), pair.results, pair.quantities, strict=True):
        lines.append(f"{side} {100 * value:6.2f} %  {result.protocol['name']} of {result.encoder['spec']}: {quantity}")
    lines += [
        f"on {pair.results[0].data['name']}, {c.n:,} test samples",
        f"A - B {100 * c.difference:+.2f}, 95 % interval {100 * c.low:+.2f} to {100 * c.high:+.2f}, p {c.p_value:.2g}",
    ]
    if c.mcnemar is not None:
        lines.append(f"only A right {c.only_a:,}, only B right {c.only_b:,}, exact McNemar p {c.mcnemar:.2g}")
    lines += [f"not alike: {difference}" for difference in pair.differences]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
