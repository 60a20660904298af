"""No unfinished marks and no paths of one machine in what users read."""

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
MARKS = re.compile(r"\b(TODO|FIXME|XXX)\b|(?<![\w.~$}-])/(work|root|tmp|home)/")
WRITTEN = {
    ".py",
    ".md",
    ".toml",
    ".sh",
    ".html",
    ".json",
}  # by us; text that models are trained on is data


def test_no_unfinished_marks_or_machine_paths():
    where = ["jaxq", "examples", "benchmarks", "README.md"]
    listed = subprocess.run(
        ["git", "ls-files", "-z", *where],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    files = [
        ROOT / name
        for name in listed.stdout.split("\0")
        if Path(name).suffix in WRITTEN
    ]
    assert files, "git lists no file"
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}"
        for path in files
        if path.is_file()
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if MARKS.search(line)
    ]
    assert not found, "\n".join(found)
