"""The rules of the house: one import direction, one list of dependencies, a README whose commands and links exist."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pandas as pd
import pytest
import rattler
import yaml

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "vqlib"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
ENVIRONMENT = yaml.safe_load((ROOT / "environment.yml").read_text())
IMPORT_NAMES = {
    "torch-fidelity": "torch_fidelity",
    "py-rattler": "rattler",
    "pyyaml": "yaml",
    "pillow": "PIL",
    "huggingface-hub": "huggingface_hub",
}
CONDA_NAMES = {"torch": "pytorch", "huggingface-hub": "huggingface_hub"}


def modules():
    return {str(path.relative_to(PACKAGE)): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports(path):
    """Dotted names a file imports, also inside functions; `from vqlib.a import b` counts as vqlib.a.b where that is a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import; write vqlib.…"
            for alias in node.names:
                inside = f"{node.module}.{alias.name}"
                is_file = (ROOT / f"{inside.replace('.', '/')}.py").exists() or (
                    ROOT / inside.replace(".", "/")
                ).is_dir()
                yield inside if is_file else node.module


def architecture_order():
    """Files of the package, as "folder/file.py", in the order of ARCHITECTURE.md's table."""
    rows = re.findall(r"^\| `([a-z/]+/)` \| (`[^|]+) \|", (ROOT / "ARCHITECTURE.md").read_text(), re.MULTILINE)
    files = [
        [*(f"{folder}{name}.py" for name in re.findall(r"`([^`]+)`", row)), f"{folder}__init__.py"]
        for folder, row in rows
    ]
    first, *others = files
    return [*first, "config.py", *(file for row in others for file in row), "__init__.py", "__main__.py"]


def out_of_order(files, order):
    """Imports {file: dotted names it imports} that point at a file not above it in `order`, as sentences; [] where all is well."""
    found = [f"{name} is listed {order.count(name)} times" for name in sorted({n for n in order if order.count(n) > 1})]
    found += [f"{file} is not listed" for file in sorted(set(files) - set(order))]
    found += [f"{name} is listed and does not exist" for name in sorted(set(order) - set(files))]
    for file in sorted(set(files) & set(order)):
        for name in files[file]:
            stem = name.removeprefix("vqlib.").replace(".", "/")
            target = next((f for f in (f"{stem}.py", f"{stem}/__init__.py") if f in files), None)
            if target is None:
                found.append(f"{file} imports {name}, which is no module: import from the file itself")
            elif target in order and order.index(target) >= order.index(file):
                found.append(f"{file} imports {target}, which does not stand above it")
    return found


def test_each_file_imports_only_from_files_above_it():
    files = {file: [n for n in imports(path) if n.split(".")[0] == "vqlib"] for file, path in modules().items()}
    files["__main__.py"] = [name for name in files["__main__.py"] if name != "vqlib"]
    assert out_of_order(files, architecture_order()) == []


def test_the_check_of_imports_sees_circles_and_upward_imports():
    order = ["config.py", "explore/view.py", "explore/frontend.py"]
    good = {"config.py": [], "explore/view.py": ["vqlib.config"], "explore/frontend.py": ["vqlib.explore.view"]}
    assert out_of_order(good, order) == []
    circle = good | {"explore/view.py": ["vqlib.explore.frontend"]}  # as `explore` once had it, inside a function
    assert out_of_order(circle, order) == ["explore/view.py imports explore/frontend.py, which does not stand above it"]
    assert out_of_order(good | {"config.py": ["vqlib.explore.view"]}, order)
    assert out_of_order(good, [*order, "explore/view.py"]) == ["explore/view.py is listed 2 times"]
    assert out_of_order(good | {"new.py": []}, order) == ["new.py is not listed"]
    assert out_of_order(good, [*order, "gone.py"]) == ["gone.py is listed and does not exist"]


def test_the_package_has_few_folders_and_a_bare_top():
    folders = {file.rpartition("/")[0] for file in modules()} - {""}
    assert len(folders) <= 12, sorted(folders)
    assert {file for file in modules() if "/" not in file} == {"__init__.py", "__main__.py", "config.py"}


def test_files_stay_small_and_hold_no_leftovers():
    for file, path in modules().items():
        text = path.read_text()
        assert len(text.splitlines()) <= 300, f"vqlib/{file} has {len(text.splitlines())} lines"
        assert not re.search(r"\b(TODO|FIXME|XXX)\b|\bimport pickle\b|\bpickle\.", text), f"vqlib/{file}"
        for call in re.findall(r"torch\.load\([^)]*\)", text):
            assert "weights_only=True" in call, f"vqlib/{file}: {call}"


def test_every_import_is_a_declared_dependency():
    declared = set(requirements())
    known = (
        {IMPORT_NAMES.get(name, name) for name in declared}
        | set(sys.stdlib_module_names)
        | {"vqlib", "tests", "benchmarks", "triton"}
    )
    core = (
        {IMPORT_NAMES.get(name, name) for name in requirements(extras=False)} | set(sys.stdlib_module_names) | {"vqlib"}
    )
    optional = {"explore/frontend.py": {"ipywidgets", "IPython"}, "studies/baselines/round_to_nearest.py": {"torchao"}}
    optional["studies/pipelined.py"] = {"ray"}
    # comes with every CUDA build of torch
    optional |= {f"kernels/cuda_{part}.py": {"triton"} for part in ("launch", "search", "soft", "ratios", "gather")}
    for file, path in modules().items():
        unknown = {name.split(".")[0] for name in imports(path)} - core - optional.get(file, set())
        assert not unknown, f"vqlib/{file} imports {unknown}: not in pyproject.toml's dependencies"
    for path in [*ROOT.glob("tests/**/*.py"), *ROOT.glob("benchmarks/*.py")]:
        siblings = {
            file.stem
            for folder in (path.parent, ROOT / "tests", ROOT / "tests/cluster")
            for file in folder.glob("*.py")
        }
        unknown = {name.split(".")[0] for name in imports(path)} - known - siblings
        assert not unknown, f"{path.name} imports {unknown}: in no list of pyproject.toml"


def requirements(extras=True):
    """{name: version range} of pyproject.toml."""
    lists = [PROJECT["dependencies"], *(PROJECT["optional-dependencies"].values() if extras else ())]
    pairs = (re.fullmatch(r"([A-Za-z0-9_.-]+)(?:\[.*\])?(.*)", line).groups() for part in lists for line in part)
    return {name.lower(): version.strip() for name, version in pairs}


def test_environment_agrees_with_pyproject():
    lines = [line for line in ENVIRONMENT["dependencies"] if isinstance(line, str)]
    pip = next(line["pip"] for line in ENVIRONMENT["dependencies"] if isinstance(line, dict))
    conda = {}
    for line in lines:
        spec = rattler.MatchSpec(line, strict=True)
        conda[spec.name.normalized if hasattr(spec.name, "normalized") else str(spec.name)] = str(spec.version or "")
    assert conda.pop("python") == PROJECT["requires-python"]
    assert conda.pop("pip") == ""
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    assert [f"setuptools{conda.pop('setuptools')}"] == build
    from_pip = dict(re.fullmatch(r"([\w.-]+)(.*)", line).groups() for line in pip if line != "-e .")
    expected = {CONDA_NAMES.get(name, name): version for name, version in requirements().items()}
    assert {**conda, **from_pip} == expected
    assert ENVIRONMENT["channels"] == ["conda-forge"] and "-e ." in pip


def test_environment_says_what_needs_each_package():
    for line in (ROOT / "environment.yml").read_text().split("dependencies:\n")[1].splitlines():
        assert "#" in line or line.strip() == "- pip:", f"no comment: {line.strip()}"


def test_constraints_pin_every_dependency():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pins = dict(line.split("==") for line in lines)
    names = {name.lower().replace("_", "-") for name in pins}
    assert set(requirements()) | {"setuptools"} <= names
    assert not any("+" in version for version in pins.values()), "a local version fits one build only"


def make_targets():
    return set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


@pytest.mark.parametrize(
    "name", ["README.md", "CONTRIBUTING.md", "ARCHITECTURE.md", "notebooks/README.md", "data/README.md"]
)
def test_documents_name_only_what_exists(name):
    text = (ROOT / name).read_text()
    commands = set(re.findall(r"(?:^|`)make ([a-z]+)", text, re.MULTILINE))
    assert commands <= make_targets(), f"{name}: make {commands - make_targets()}"
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", text)
    missing = [link for link in links if "://" not in link and not (ROOT / name).parent.joinpath(link).exists()]
    assert not missing, f"{name} links to {missing}"


def test_ci_runs_the_test_command_of_the_readme():
    script = (ROOT / ".ci/run").read_text()
    assert "make test" in script and "make test" in (ROOT / "README.md").read_text()


def tracked_text_files():
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    names = listed.stdout.splitlines() or [str(path.relative_to(ROOT)) for path in PACKAGE.rglob("*.py")]
    suffixes = {".py", ".md", ".toml", ".yml", ".txt", ".ipynb", ".json", ".csv", ""}
    return [ROOT / name for name in names if Path(name).suffix in suffixes and (ROOT / name).is_file()]


def test_no_path_of_a_machine_is_in_the_repository():
    pattern = re.compile(r"(?<![\w.~])/(?:work|root|home|Users|opt)/")
    for path in tracked_text_files():
        if path != Path(__file__).resolve():
            found = pattern.search(path.read_text(errors="replace"))
            assert not found, f"{path.relative_to(ROOT)} contains a machine path: {found.group()}"


def test_quoted_figures_carry_their_source():
    tables = sorted((ROOT / "data/paper").glob("*.csv"))
    assert len(tables) >= 4
    for path in tables:
        table = pd.read_csv(path)
        assert table["source"].notna().all() and table["mark"].notna().all(), path.name
        assert set(table["mark"]) <= {"summary", "third-party", "release", "derived", "published"}, path.name
    candidates = pd.read_csv(ROOT / "data/paper/candidates.csv").set_index("candidates")["fid"]
    assert candidates.isna().loc[2] and candidates.isna().loc[4]  # not known: never to be filled in from memory
