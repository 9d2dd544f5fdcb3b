"""The notes say what the code does: equation table and tags agree, names and links exist, tables
are those of the JSON files, the worked example is right, and sentences and tables stay short."""

import glob
import inspect
import json
import os
import re
import sys

import pytest
import torch

import bilora
import model
import train_glue
import train_gsm8k

HERE = os.path.dirname(__file__)
NOTES = os.path.join(HERE, "..", "notes")
sys.path.insert(0, NOTES)
import ascent  # noqa: E402
import measures  # noqa: E402
import memory  # noqa: E402
import methods  # noqa: E402
import pictures  # noqa: E402
import sharpness  # noqa: E402
import study_plan  # noqa: E402
import study_tables  # noqa: E402
import sweep  # noqa: E402
import tables  # noqa: E402

MODULES = (bilora, measures, methods, sharpness)


def read(*path):
    with open(os.path.join(*path), encoding="utf-8") as file:
        return file.read()


PAGES = {os.path.basename(path): read(path)
         for path in sorted(glob.glob(os.path.join(NOTES, "*.md")))}
README = read(HERE, "..", "README.md")
TESTS = "".join(read(path) for path in glob.glob(os.path.join(HERE, "test_*.py")))
ROW = re.compile(r"^\| \((\w+)\) \|[^|]*\|([^|]*)\|([^|]*)\|$", re.MULTILINE)
ROWS = {match[1]: (re.findall(r"`(\w+)`", match[2]), re.findall(r"`(\w+)`", match[3]))
        for match in ROW.finditer(PAGES["README.md"])}
NUMBERS = [*map(str, range(1, 11)), *(f"A{i}" for i in range(1, 23))]


def tags(text):
    """Equation numbers in "Eq. (3, 4)", "Eq. (8-10)" and in comments "# (9) ascent"."""
    comments = [comment for comment in re.findall(r"#(.*)", text) if "Eq." not in comment]
    groups, found = re.findall(r"Eq\. \(([^)]*)\)", text), set()
    for comment in comments:
        groups += re.findall(r"\((A?\d[^)]*)\)", comment)
    for part in re.split(r",\s*", ", ".join(groups)):
        for letter, first, last in re.findall(r"^(A?)(\d+)(?:-A?(\d+))?$", part.strip()):
            found |= {f"{letter}{i}" for i in range(int(first), int(last or first) + 1)}
    return found


def tagged():
    """{equation: names of the public functions and classes whose source has its tag}."""
    found = {}
    for module in MODULES:
        for name, member in vars(module).items():
            if getattr(member, "__module__", None) != module.__name__ or not callable(member):
                continue
            source = inspect.getsource(member)
            if "Eq. (n)" not in source:
                for tag in tags(source):
                    found.setdefault(tag, set()).add(name)
    return found


def test_tags_are_read():
    text = "Eq. (3, 4) x Eq. (A2, A3)\n  loss  # (8) descent, (9) ascent\n  x  # (10)\nEq. (8-10)"
    assert tags(text) == {"3", "4", "A2", "A3", "8", "9", "10"}


def test_the_table_covers_the_equations():
    assert list(ROWS) == NUMBERS


def test_tags_and_table_agree():
    """A function of the table has the tag, and a function with the tag is in the table."""
    found = tagged()
    assert set(found) <= set(NUMBERS)
    for number, (functions, _) in ROWS.items():
        assert set(functions) == found.get(number, set()), number
    without = {f"A{i}" for i in (6, 7, *range(8, 16), 20, 21)}  # arguments, definitions, problems
    assert {number for number, (functions, _) in ROWS.items() if not functions} == without


MEANINGS = {  # what the paper's equation is about, in a word of the table's row
    "1": "W0 + s B A", "2": "dL/dB", "3": "objective", "4": "perturbation", "5": "eps_B eps_A",
    "6": "first order", "7": "B2 A2", "8": "objective", "9": "four updates", "10": "clip",
    "A1": "objective", "A2": "rho g", "A3": "descent", "A4": "perturbed weights", "A5": "step (9)",
    "A6": "Proposition 2", "A7": "inner product", "A8": "problem", "A9": "linearisation",
    "A10": "inner problem", "A11": "maximizer", "A12": "penalty", "A13": "rank <= r",
    "A14": "B2 A2", "A15": "linearisation", "A16": "inner problem",
    "A17": "singular value decomposition", "A18": "maximizer", "A19": "value", "A20": "Ky Fan",
    "A21": "outer problem", "A22": "alpha g"}


def test_what_each_number_stands_for():
    """The list above is the paper's second version's, not the code's: a number that moves to
    another equation is noticed."""
    rows = dict(re.findall(r"^\| \((\w+)\) \| ([^|]*) \|", PAGES["README.md"], re.MULTILINE))
    assert rows.keys() == MEANINGS.keys()
    for number, words in MEANINGS.items():
        assert words in rows[number], number


def test_every_test_of_the_table_exists():
    for number, (_, tests) in ROWS.items():
        assert tests, number
        for test in tests:
            assert f"\ndef {test}(" in TESTS, (number, test)


@pytest.mark.parametrize("page", PAGES)
def test_names_links_and_tests_in_the_notes_exist(page):
    text = PAGES[page]
    modules = (bilora, model, train_glue, train_gsm8k, measures, methods, sharpness, sweep, ascent)
    known = [set(vars(module)) for module in modules]
    for line in re.findall(r"^Code: (.*?)\n\n", text, re.DOTALL | re.MULTILINE):
        for name in re.findall(r"`(\w+)`", line):
            assert any(name in names for names in known), name
    for name in re.findall(r"`(test_\w+)`", text):
        assert f"\ndef {name}(" in TESTS, name
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        assert target.startswith("http") or os.path.exists(os.path.join(NOTES, target)), target
    for target, anchor in re.findall(r"\]\(([^)#]+)#([^)]*)\)", text):
        titles = re.findall(r"^#+ (.*)$", PAGES[target], re.MULTILINE)
        plain = [re.sub(r"[^\w\- ]", "", title).lower() for title in titles]
        assert anchor in [title.replace(" ", "-") for title in plain], anchor


def test_each_note_has_code_something_measured_and_exercises():
    notes = [text for name, text in PAGES.items() if re.match(r"[1-6]_", name)]
    assert len(notes) == 6 and re.match(r"7_", sorted(PAGES)[6])
    for text in notes:
        assert "\nCode: " in text and "\n## Measured" in text
        assert "![" in text or tables.MARK.search(text) or "7_results.md#" in text
        assert 2 <= len(re.findall(r"^\d\. ", text.split("## Exercises")[1], re.MULTILINE)) <= 3


def test_the_tables_are_what_was_measured():
    numbers = tables.measured()
    for name, text in {**PAGES, "../README.md": README}.items():
        assert tables.filled(text, numbers) == text, f"{name}: run python notes/tables.py"
    assert sum(len(tables.MARK.findall(text)) for text in PAGES.values()) > 10
    for task, found in numbers.items():
        page = read(NOTES, "figures", f"{task}-sharpness.md")
        assert page == tables.all_tables(task, found), f"{task}: run python notes/tables.py"


def test_the_tables_of_the_ascent_are_what_was_measured():
    paths = glob.glob(os.path.join(NOTES, "figures", "*-ascent-c.json"))
    assert len(paths) == 2
    for path in paths:
        text = ascent.tables(json.loads(read(path)))
        assert text == read(path.replace(".json", ".md")), path
        assert text.strip() in PAGES["4_bilora.md"], path


def test_the_table_of_the_memory_is_what_is_computed(capsys):
    memory.main([])
    assert capsys.readouterr().out in PAGES["7_results.md"]


def test_every_symbol_is_in_the_code():
    """The words of the last column stand in the modules' sources."""
    modules = (bilora, measures, methods, sharpness, study_plan, study_tables)
    sources = "".join(map(inspect.getsource, modules))
    for line in re.findall(r"^\|.*\|$", PAGES["symbols.md"], re.MULTILINE):
        for word in re.findall(r"`([^`/]+)`", line.split("|")[-2]):
            if not word.startswith("torch."):
                for name in re.findall(r"[a-zA-Z]\w*", word):
                    assert re.search(rf"\b{name}\b", sources), (word, name)


def test_every_figure_is_in_a_note():
    """And no other file is left in notes/figures."""
    for name in os.listdir(os.path.join(NOTES, "figures")):
        assert any(f"figures/{name})" in text for text in (*PAGES.values(), README)), name


def test_the_pictures_are_drawn_again(tmp_path, monkeypatch):
    """Those that are there, from the JSON file alone."""
    monkeypatch.setattr(pictures, "NOTES", str(tmp_path))
    space = {"radii": [0.1, 0.5], "increase": [1.0, 7.0], "eigenvalue": 3.0, "residual": 0.25}
    worst = {method: {"0": {"LoRA": space, "full": space}} for method in ("lora", "bi-lora")}
    (tmp_path / "figures").mkdir()
    text = json.dumps({"measured": {"a": {}, "c": worst}})
    (tmp_path / "figures" / "x-sharpness.json").write_text(text)
    picture = tmp_path / "figures" / "x-worst-case.png"
    picture.write_bytes(b"old")
    pictures.main()
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert len(list(picture.parent.iterdir())) == 2


@pytest.mark.parametrize("mean, error, one, two", [
    (-8.563e-05, 0.00027, "-0.0001 ± 0.0003", "-0.00009 ± 0.00027"),
    (0.08089, 0.013, "0.08 ± 0.01", "0.081 ± 0.013"),
    (0.7109, 0.0096, "0.71 ± 0.01", "0.7109 ± 0.0096"),  # 0.0096 is rounded to 0.01
    (0.719, 0.00416, "0.719 ± 0.004", "0.7190 ± 0.0042"),
    (246.0, 43.0, "250 ± 40", "246 ± 43"), (13.6, 1.7, "14 ± 2", "13.6 ± 1.7"),
    (0.05, 2.4e-10, "0.05000 ± 0.00000", "0.05000 ± 0.00000"),  # five digits after the point
    (-0.00001, 0.002, "0.000 ± 0.002", "0.0000 ± 0.0020"), (9.96, 0.98, "10 ± 1", "9.96 ± 0.98"),
    (0.0, 0.0, "0 ± 0", "0 ± 0"), (0.123456, None, "0.123", "0.123")])
def test_digits_follow_the_error(mean, error, one, two):
    entry = {"mean": mean, "stderr": error, "n": 3}
    assert tables.number_of(entry) == one and tables.number_of(entry, 2) == two
    if mean > 0:
        assert tables.number_of(entry, 2, "+") == "+" + two


def entry(mean, **more):
    return {"value": {"mean": mean, "stderr": 0.25, "n": 3}, **more}


LESS = entry(1.0, difference={"mean": -1.0, "stderr": 0.5, "n": 3})
MADE_UP = {"x": {"c": {"up": {"lora": entry(2.0), "bi-lora": LESS}, "down": {"lora": entry(9.0)}},
                 "f": {"one: rank": {"bi-lora": entry(3.0)}, "two: rank": {"bi-lora": entry(4.0)}}},
           "y": {"c": {"up": {"lora": entry(5.0)}}}}


@pytest.mark.parametrize("kind, mark, expected", [
    ("table", 'x c * "up"', """\
|  | lora | bi-lora minus lora |
| --- | --- | --- |
| up | 2.0 ± 0.2 | -1.0 ± 0.5 |
"""),
    ("table", 'x c bi-lora "u*"', """\
|  | x |
| --- | --- |
| up | 1.0 ± 0.2 |
"""),
    ("table", "* c lora", """\
|  | x | y |
| --- | --- | --- |
| up | 2.0 ± 0.2 | 5.0 ± 0.2 |
| down | 9.0 ± 0.2 |  |
"""),
    ("table", "* c *", """\
|  | lora | bi-lora minus lora |
| --- | --- | --- |
| x, up | 2.0 ± 0.2 | -1.0 ± 0.5 |
| x, down | 9.0 ± 0.2 |  |
| y, up | 5.0 ± 0.2 |  |
"""),
    ("pivot", "x c *", """\
|  | up | down |
| --- | --- | --- |
| lora | 2.0 ± 0.2 | 9.0 ± 0.2 |
| bi-lora | 1.0 ± 0.2 |  |
"""),
    ("pivot", 'x f * "rank"', """\
|  | rank |
| --- | --- |
| bi-lora, one | 3.0 ± 0.2 |
| bi-lora, two | 4.0 ± 0.2 |
""")])
def test_a_table(kind, mark, expected):
    assert tables.table(kind, mark, MADE_UP) == expected


@pytest.mark.parametrize("mark", ['x c * "sideways"', "x c bi-lora-power", "x d *"])
def test_a_mark_that_asks_for_what_was_not_measured(mark):
    with pytest.raises(ValueError, match="table: x"):
        tables.table("table", mark, MADE_UP)


def sentences(text):
    """Those of the paragraphs, list items and captions; not of code, formulas, tables, headings."""
    text = re.sub(r"```.*?```|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r"^(\||>|#|    ).*$", "", text, flags=re.MULTILINE)
    text = re.sub(r"^ *([*-]|\d+\.) ", "\n", text, flags=re.MULTILINE)
    text = re.sub(r"\]\([^)]*\)", "]", text)
    for paragraph in re.split(r"\n\s*\n", text):
        yield from re.split(r"(?<=[.?!])[*)\"]*\s+", paragraph)


@pytest.mark.parametrize("page, text", [*PAGES.items(), ("../README.md", README)])
def test_sentences_and_tables_are_short(page, text):
    for sentence in sentences(text):
        words = [word for word in sentence.split() if re.search(r"\w", word)]
        assert len(words) <= 30, sentence
    for rule in re.findall(r"^\|[-| :]+\|$", text, re.MULTILINE):
        assert rule.count("|") <= 7, rule


def test_the_quantities_of_a_table():
    """One made-up result for each part, and what a table says of it, worked out by hand."""
    a = {"full": {"alphas": [-1.0, 0.0, 1.0], "losses": [[3.0, 1.0, 2.0], [5.0, 1.0, 4.0]]}}
    found = tables.quantities("a", a)
    assert found == {"full space, mean increase at alpha = ±1": pytest.approx(2.5)}
    b = {"LoRA": {"alphas": [0, 2], "loss": [0.5, 0.75], "accuracy": [0.9, 0.6]}}
    assert tables.quantities("b", b) == {
        "LoRA space, loss at 0": 0.5, "LoRA space, loss at 2": 0.75,
        "LoRA space, accuracy at 0": 0.9, "LoRA space, accuracy at 2": 0.6}
    c = {"full": {"radii": [0.1, 0.5], "increase": [1.0, 7.0], "eigenvalue": 3.0, "residual": 0.25}}
    assert tables.quantities("c", c) == {
        "full space, worst increase within 0.1": 1.0, "full space, worst increase within 0.5": 7.0,
        "full space, largest eigenvalue": 3.0, "full space, residual of the eigenvalue": 0.25}
    d = {"step": [0, 5, 10], "primary": [0.1, 0.6, 1.0], "B": [None, 0.5, 1.0],
         "A": [0.8, 0.9, 1.0], "ratio": [None, 100.0, 300.0], "rank": [None, 3.0, 2.0],
         "layers": [[None, None, None], [90.0, 30.0, 8.0], [110.0, 50.0, 8.0]]}
    found = tables.quantities("d", d)
    layers = [found[f"first-order terms / third, single layers, {name}"]
              for name in ("smallest", "median", "largest")]
    assert layers == [8.0, 40.0, 100.0] and found["effective rank of B2 A2, half-way"] == 3.0
    assert found["B1 A1, half-way, with its last value"] == 0.6
    assert found["first-order terms / third, median"] == 200.0
    e = {"step": [3, 9], "cosine_batch": [0.3, -0.1], "gain_batch": [0.5, 0.1]}
    assert tables.quantities("e", e) == {
        "cosine batch": pytest.approx(0.1), "gain batch": pytest.approx(0.3),
        "cosine batch, root mean square": pytest.approx(0.05**0.5)}
    lags = {f"lag {lag}": [None, None, 0.2, 0.4] for lag in (1, 8, 32)}
    f = {"Adam": {"rank": [8.0, 4.0, 2.0, 1.0], "final": [0.0, 0.1, 0.7, 1.0],
                  "cosine_batch": [None, 0.5, None, 0.1],
                  "cosine_sample": [0.5, None, 0.25, None], **lags}}
    found = tables.quantities("f", f)
    assert found["Adam: effective rank"] == 1.5
    assert found["Adam: with itself 8 steps ago"] == pytest.approx(0.3)
    assert found["Adam: cosine half-way with its last value"] == 0.7
    assert found["Adam: cosine with G over the sample"] == 0.25


def test_starts_and_layers_have_the_recorded_scores():
    """The last three cells of the rows of note 8 that figures/relatives.json has by name."""
    with open(os.path.join(NOTES, "figures", "relatives.json")) as file:
        found, lines = json.load(file), PAGES["8_relatives.md"].splitlines()
    for name, run in found.items():
        for method, entry in run["summary"].items():
            if name in ("all", "relative radius") or method == "lora" and "smaller" in name:
                continue
            less = run["difference"].get(method, {}).get("accuracy")
            cells = [tables.number_of(entry["accuracy"]),
                     tables.number_of(less) if less else "-", tables.number_of(entry["rise"])]
            assert [line for line in lines if line.endswith(f"| {' | '.join(cells)} |")], cells


def test_the_worked_example():
    """What the comments of the example say, by the singular values of G."""
    (block,) = re.findall(r"```python\n(.*?)```", PAGES["5_proposition_3.md"], re.DOTALL)
    scope = {"torch": torch}
    exec(block, scope)
    G, said = scope["G"], {}
    for name, norm, gain in (("right_1", 1, 4), ("right_2", 1, 5), ("papers", 1.414, 7),
                             ("inside", 1, 4.950)):
        assert scope[name].norm().item() == pytest.approx(norm, abs=1e-3)
        assert (G * scope[name]).sum().item() == pytest.approx(gain, abs=1e-3)
        said[name] = gain
    sigma = torch.linalg.svdvals(G)
    assert said["right_1"] == pytest.approx(sigma[0].item())
    assert said["right_2"] == pytest.approx(sigma.norm().item())
    assert said["papers"] == pytest.approx(sigma.sum().item()) and said["inside"] < said["right_2"]
