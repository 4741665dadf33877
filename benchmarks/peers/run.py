"""Run the peers' scripts, each with the packages that its first lines pin, beside this environment's own.

python benchmarks/peers/run.py [--text FILE] [NAME ...]

A script's packages go into build/peers/NAME; its JSON goes into benchmarks/results. A script that says `apart` starts
its peer as a process, as its packages do not go with ours; one that says `text` is left out where no FILE is given.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tomllib
from datetime import UTC, datetime
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent


def main(names: list[str], text: str | None) -> None:
    for script in sorted(HERE.glob("*.py")):
        found = re.search(r"^# /// script\n(.*?)^# ///$", script.read_text("utf-8"), re.MULTILINE | re.DOTALL)
        if not found or (names and script.stem not in names):
            continue
        header = tomllib.loads(re.sub(r"^# ?", "", found.group(1), flags=re.MULTILINE))
        pins, how = header["dependencies"], header.get("tool", {}).get("longshort", {})
        apart = how.get("apart", False)
        if how.get("text") and text is None:
            print(f"{script.stem} needs a text: --text FILE, or make bench-peers TEXT=FILE", file=sys.stderr)
            continue
        place = ROOT / "build" / "peers" / script.stem
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--upgrade", "--target", str(place)]
        ours = [] if apart else ["-c", str(ROOT / "constraints.txt")]
        subprocess.run([*install, *ours, *pins], check=True)
        done = subprocess.run(
            [sys.executable, str(script), *([text] if how.get("text") and text else [])],
            env=os.environ | {"PEER_PACKAGES" if apart else "PYTHONPATH": str(place)},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        result = ROOT / "benchmarks" / "results" / f"{datetime.now(UTC).date()}-{script.stem.replace('_', '-')}.json"
        result.write_text(done.stdout, "utf-8")
        print(result)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--text", metavar="FILE")
    given = parser.parse_args()
    main(given.names, given.text)
