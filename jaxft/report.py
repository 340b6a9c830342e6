"""Writes a run's report, DIR/report.html: one file that needs no network. Training updates it every minute.

python -m jaxft.report --workdir runs/cifar10                          writes runs/cifar10/report.html again
python -m jaxft.report --workdir runs/a --compare runs/b runs/c        writes runs/a/compare.html, runs side by side
"""

if __name__ == "__main__":  # a command's process is prepared before JAX is imported
    from jaxft.cli import run

    run("report")

import os

from jaxft.errors import ArgumentParser, UserError, write_message
from jaxft.files import reason
from jaxft.reporting.evaluation_file import load_run
from jaxft.reporting.page import read_sheet, render, render_comparison, write_page
from jaxft.run import remote_workdir
from jaxft.run.workdir import Workdir


def main(argv: list[str]) -> None:
    parser = ArgumentParser("python -m jaxft.report", __doc__)
    parser.add_argument("--workdir", required=True, metavar="DIR", help="workdir of the run")
    parser.add_argument("--compare", nargs="+", metavar="DIR", default=[], help="workdirs of other runs")
    args = parser.parse_args(argv)
    workdirs = [Workdir(remote_workdir.reading_folder(workdir)) for workdir in (args.workdir, *args.compare)]
    runs = [load_run(workdir) for workdir in workdirs]
    path = workdirs[0].comparison if args.compare else workdirs[0].report
    sheet = workdirs[0].sheet
    if not args.compare and os.path.lexists(sheet) and not read_sheet(workdirs[0]):
        write_message(f"{sheet} is not an image and is left out of the report; remove it")
    html = render_comparison(runs) if args.compare else render(runs[0])
    try:
        write_page(path, html)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {reason(error)}; make room, or correct its permissions") from None
    remote_workdir.upload(args.workdir, path)
    print(path)
