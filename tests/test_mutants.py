"""The table of mutants matches the source; `python tests/mutate.py` runs it."""

import re
from pathlib import Path

from mutants import MUTANTS

ROOT = Path(__file__).parents[1]


def test_every_line_stands_in_its_file_once():
    for mutant in MUTANTS:
        found = (ROOT / mutant.file).read_text().count(mutant.original)
        assert found == 1, f"{mutant.original!r} occurs {found} times in {mutant.file}"
        assert mutant.mutated != mutant.original


def test_every_test_is_there():
    for mutant in MUTANTS:
        for test in mutant.tests.split():
            file, _, name = test.partition("::")
            name = name.partition("[")[0]
            source = (ROOT / "tests" / file).read_text()
            assert not name or re.search(rf"^def {name}\(", source, re.MULTILINE), test
