"""Run the peers' scripts, each with the packages that its first lines pin, beside this environment's own.

python benchmarks/peers/run.py [NAME ...]

A script's packages go into build/peers/NAME; its JSON goes into benchmarks/results.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from datetime import UTC, datetime
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent


def main(names: list[str]) -> None:
    for script in sorted(HERE.glob("*.py")):
        if script.name == "run.py" or (names and script.stem not in names):
            continue
        found = re.search(r"^# /// script\n(.*?)^# ///$", script.read_text("utf-8"), re.MULTILINE | re.DOTALL)
        assert found, f"{script} pins nothing"
        pins = tomllib.loads(re.sub(r"^# ?", "", found.group(1), flags=re.MULTILINE))["dependencies"]
        place = ROOT / "build" / "peers" / script.stem
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--upgrade", "--target", str(place)]
        subprocess.run([*install, "-c", str(ROOT / "constraints.txt"), *pins], check=True)
        done = subprocess.run(
            [sys.executable, str(script)],
            env=os.environ | {"PYTHONPATH": str(place)},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        result = ROOT / "benchmarks" / "results" / f"{datetime.now(UTC).date()}-{script.stem.replace('_', '-')}.json"
        result.write_text(done.stdout, "utf-8")
        print(result)


if __name__ == "__main__":
    main(sys.argv[1:])
