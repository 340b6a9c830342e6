"""A run's report, DIR/report.html: one file to look at, which needs no network. Training writes it each minute.

python -m jaxft.report --workdir runs/cifar10                          writes runs/cifar10/report.html again
python -m jaxft.report --workdir runs/a --compare runs/b runs/c        writes runs/a/compare.html, runs side by side
"""

import sys

from jaxft.errors import ArgumentParser, run_command
from jaxft.reporting.page import _write, load_run, render, render_comparison
from jaxft.run import remote_workdir


def main(argv: list[str]) -> None:
    parser = ArgumentParser("python -m jaxft.report", __doc__)
    parser.add_argument("--workdir", required=True, metavar="DIR", help="of the training run")
    parser.add_argument("--compare", nargs="+", metavar="DIR", default=[], help="workdirs of other runs")
    args = parser.parse_args(argv)
    folders = [remote_workdir.reading_folder(workdir) for workdir in (args.workdir, *args.compare)]
    runs = [load_run(folder) for folder in folders]
    path = folders[0] / ("compare.html" if args.compare else "report.html")
    _write(path, render_comparison(runs) if args.compare else render(runs[0]))
    remote_workdir.upload(args.workdir, path)
    print(path)


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
