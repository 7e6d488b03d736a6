"""The repository itself: import rules, tracked files, versions, what its texts promise."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from importlinter.cli import lint_imports

import alignfed
from alignfed.errors import AlignFedError
from alignfed.version import __version__

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "src").rglob("*.py"))


def tracked_files():
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=False,
    )
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    names = [name for name in listed.stdout.decode().split("\0") if name]
    return [ROOT / name for name in names if (ROOT / name).is_file()]


def text_of(path):
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError:
        return ""


def test_import_rules_are_kept(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert lint_imports(config_filename="pyproject.toml", no_cache=True) == 0


def test_an_import_rule_that_is_broken_is_noticed(tmp_path, monkeypatch):
    """The rules above could be empty; so break one and see."""
    package = tmp_path / "src" / "alignfed"
    for path in SOURCES:
        copy = package / path.relative_to(ROOT / "src" / "alignfed")
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(path.read_text())
    broken = package / "core" / "staleness.py"
    broken.write_text(broken.read_text() + "\nimport time\n")
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    ran = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys; sys.path.insert(0, 'src');"
            "from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))",
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert ran.returncode != 0
    assert "core decides" in ran.stdout
    assert re.search(r"staleness\s+->\s+time", ran.stdout)


def test_no_tracked_file_holds_a_path_of_this_machine():
    # A clone below a folder that every machine has says nothing about this one.
    common = {Path(name) for name in ("/", "/tmp", "/var/tmp", "/home", "/opt", "/srv", "/builds")}
    above = f"{ROOT if ROOT.parent in common else ROOT.parent}/"
    homes = re.compile(r"(?<![\w.])/(?:root|home/[a-z]+|Users/[A-Za-z]+)/\w")
    for path in tracked_files():
        text = text_of(path)
        assert above not in text, path
        assert not homes.search(text), path


def test_no_tracked_file_is_larger_than_five_megabytes():
    assert [path for path in tracked_files() if path.stat().st_size > 5_000_000] == []


def test_what_travels_in_the_wheel_as_built_in_is_at_most_four_megabytes():
    folder = ROOT / "src" / "alignfed" / "builtin" / "model"
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) <= 4_000_000


def test_nothing_pickles_or_unpickles():
    forbidden = re.compile(
        r"\bimport pickle|\bpickle\.|torch\.load\(|torch\.save\(|allow_pickle=True|\bdill\b"
        r"|\bjoblib\b|\bcloudpickle\b"
    )
    for path in (*SOURCES, *(ROOT / "scripts").glob("*.py")):
        assert not forbidden.search(path.read_text()), path


def test_source_files_stay_below_four_hundred_lines():
    assert [str(path) for path in SOURCES if len(path.read_text().splitlines()) > 400] == []


def test_no_file_is_a_drawer_for_everything():
    drawers = {"utils", "util", "helpers", "manager", "misc"}
    assert not drawers & {path.stem for path in SOURCES}


def test_every_module_opens_with_its_rule():
    for path in SOURCES:
        text = path.read_text()
        assert not text.strip() or text.startswith('"""'), path


def test_public_names_exist_and_are_documented():
    for name in alignfed.__all__:
        assert getattr(alignfed, name).__doc__, name


def test_every_error_is_an_alignfed_error():
    import alignfed.errors as errors

    found = [value for value in vars(errors).values() if isinstance(value, type)]
    found = [value for value in found if value.__module__ == "alignfed.errors"]
    assert len(found) > 5
    assert all(issubclass(value, AlignFedError) for value in found)


def test_an_error_keeps_its_values():
    error = AlignFedError("size 3 is above 2", size=3, limit=2)
    assert (error.size, error.limit, error.values) == (3, 2, {"size": 3, "limit": 2})


def test_constraints_pin_every_dependency_within_its_range():
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = dict(
        line.split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    )
    extras = project["optional-dependencies"]
    for text in [*project["dependencies"], *extras["deploy"], *extras["dev"]]:
        requirement = Requirement(text)
        if requirement.name == project["name"]:  # one extra that asks for another
            continue
        assert pinned[canonicalize_name(requirement.name)] in requirement.specifier, text


def test_the_two_commands_of_the_readme_are_targets():
    makefile, readme = (ROOT / "Makefile").read_text(), (ROOT / "README.md").read_text()
    for target in ("demo", "test"):
        assert f"make {target}" in readme
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)
    assert "make test" in (ROOT / ".ci" / "run").read_text()


def test_documents_link_to_what_exists():
    for path in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", path.read_text()):
            if "://" not in target:
                assert (path.parent / target).exists(), f"{path}: {target}"


def test_the_changelog_knows_this_version():
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert f"## {__version__}" in changelog or "## Unreleased" in changelog
