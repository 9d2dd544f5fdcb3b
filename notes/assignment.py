"""A student's copy of the project: some functions are the student's to write, and tests grade them.

    python notes/assignment.py COPY --sheet 3
    python notes/assignment.py COPY --blank lora_step lora_sam_step
    python notes/assignment.py COPY --check

The first two commands write the folder COPY: for a sheet of notes/assignments.md, or for chosen
tasks.  There the body of each function of a task is one line, which raises NotImplementedError;
signature and docstring stay.  With --sheet those of later sheets are blank too: the copy would give
them away.  SHEET.md says what to write, with equations and hints, and which tests grade it.  The
third command puts COPY's files of these tasks, and nothing else of COPY, beside this project's
tests, runs them, and says in plain words what is done; the exit code is 1 where something is not.
COPY may hold the handed-in files alone: --blank says for which tasks.  --list names all tasks.
"""

import argparse
import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from typing import NamedTuple

PROJECT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
FILES = ("bilora.py", "model.py", "train_glue.py", "train_gsm8k.py", "requirements.txt",
         "pytest.ini", "notes")
TESTS = ("conftest.py", "test_steps.py", "test_propositions.py", "test_adapter.py",
         "test_measures.py", "test_power.py", "golden")
LEFT_OUT = shutil.ignore_patterns("__pycache__", "solutions.md", "mistakes.py")
SHEET, BLANKS = "SHEET.md", "blanks.json"
NEEDED = "add_lora"  # by the tests of sheet 1, though it is sheet 2's
LIMIT = 300  # seconds that the tests of a check may take


class Task(NamedTuple):
    file: str
    functions: tuple  # blanked; the last ones are helpers that would give the answer away
    equation: str
    text: str         # what to write
    hints: tuple
    tests: tuple      # that grade it: file::name


TASKS = {
    "forward": Task(
        "bilora.py", ("LoRALinear.forward",), "(1), (7)",
        "The output of an adapted layer, without ever forming the (m, n) matrix B A.",
        ("x comes as (..., n); there may be no row at all.",
         "`self.frozen` is the product with W0; `self.pairs(self.training)` lists pairs.",
         "Count multiplications: (x A^T) B^T is cheap, x (B A)^T is not.",
         "The base and x may be bfloat16; the factors are float32, and follow the others' dtype."),
        ("test_steps.py::test_scale_and_forward_by_hand",
         "test_steps.py::test_forward_equals_dense_weight",
         "test_steps.py::test_forward_forms_no_full_matrix",
         "test_steps.py::test_low_precision_forward",
         "test_steps.py::test_gradients_eq_2_and_9",
         "test_steps.py::test_shapes_of_a_batch_are_those_of_nn_linear")),
    "add_lora": Task(
        "bilora.py", ("add_lora",), "(1)",
        "Freeze the model, put an adapted layer in the place of each chosen linear layer, and "
        "return the list of them.",
        ("`_targeted` chooses among names; `model.set_submodule` replaces a layer.",
         "Check everything before you change anything, and first that there are no adapters yet: "
         "a message with the word `already`.  `_require_plain`, `_require_read_by_itself` and "
         "`_require_ranks` are such checks.",
         "aux_rank changes no primary pair: make those first, then the others by `_new_pair`.",
         "One linear layer may stand under two names: both get the one adapted layer."),
        ("test_steps.py::test_add_lora_freezes_all_but_adapters_and_skips_heads",
         "test_steps.py::test_add_lora_targets",
         "test_steps.py::test_a_failed_add_lora_changes_nothing",
         "test_steps.py::test_add_lora_adapts_a_linear_under_two_names_once",
         "test_steps.py::test_auxiliary_rank_does_not_change_the_primary_initialisation",
         "test_steps.py::test_add_lora_refuses_a_tied_embedding")),
    "lora_step": Task(
        "bilora.py", ("lora_step",), "(2)",
        "One step of LoRA.  It is the pattern for the next ones.",
        ("`one_pass` runs the closure on fresh gradients, and returns the loss.",),
        ("test_steps.py::test_lora_step_eq_2",)),
    "lora_sam_step": Task(
        "bilora.py", ("lora_sam_step", "perturbed", "scaled"), "(3), (4)",
        "Two passes on one batch: up by rho g / F, the gradient there, and back to the weights as "
        "they were, bit for bit.  Then a step of the optimizer.",
        ("`perturbed` is a context manager: w + eps inside, w afterwards, exception or not.",
         "w + eps - eps is not w in floating point: keep a copy.  Add in the wider dtype of the "
         "two, and round once.",
         "An autocast region around the step keeps copies of weights: clear its cache.",
         "The passes are called `LoRA-SAM, pass 1` and `LoRA-SAM, pass 2` in messages.  `one_pass` "
         "begins each with fresh gradients.",
         "Both passes draw the same dropout masks: fork the random stream around the first one.",
         "One norm over all parameters; where it is zero nothing moves."),
        ("test_steps.py::test_lora_sam_step_eq_4",
         "test_steps.py::test_lora_sam_perturbs_only_params",
         "test_steps.py::test_plain_sam_eq_a2_a3",
         "test_steps.py::test_perturbation_does_not_depend_on_the_loss_scale",
         "test_steps.py::test_weights_come_back_bit_for_bit_in_their_own_storage",
         "test_steps.py::test_all_zero_gradient_gives_no_perturbation",
         "test_steps.py::test_both_passes_draw_the_same_dropout_masks",
         "test_steps.py::test_a_list_is_scaled_by_one_factor",
         "test_steps.py::test_perturbed_rounds_once_and_restores_whatever_happens",
         "test_steps.py::test_perturbation_reaches_a_surrounding_autocast_region")),
    "perturbation_norm": Task(
        "bilora.py", ("perturbation_norm",), "(10)",
        "c, the norm of B2 A2 over all layers, from r2 x r2 matrices alone.",
        ("Without s, as (10) prints it.  In float32 or wider, also in an autocast region: "
         "`_product` has the pattern.",
         "Without auxiliary pairs c is a 0-dim 0."),
        ("test_steps.py::test_gram_norm_equals_dense_norm",
         "test_steps.py::test_gram_norm_forms_no_full_matrix")),
    "clip_perturbation_": Task(
        "bilora.py", ("clip_perturbation_",), "(10)",
        "If c > rho, shrink every B2 and A2 so that c becomes rho.  Return c as it was.",
        ("c is a product of two factors, and both shrink alike.",
         "No Python `if` on a tensor: torch.where chooses without waiting for the device.",
         "`_require_radius` and `_perturbed_layers` come first.  An infinite c scales nothing."),
        ("test_steps.py::test_clip_is_global_acts_only_outside_and_lands_on_the_ball",
         "test_steps.py::test_an_infinite_c_scales_nothing",
         "test_steps.py::test_clip_needs_no_value_on_the_host")),
    "bilora_step": Task(
        "bilora.py", ("bilora_step",), "(8), (9), (10)",
        "One pass gives both gradients; the primary pair descends, the auxiliary one ascends, and "
        "the clip follows.",
        ("Check first, in this order: `_require_radius`, `_perturbed_layers`, `_require_game`.",
         "`one_pass` takes further groups of parameters that have to get a gradient.",
         "`ascent` has maximize=True: its step() already goes uphill.",
         "All right-hand sides of (9) are those of one step: take no gradient anew."),
        ("test_steps.py::test_bilora_step_eq_9_10",
         "test_steps.py::test_another_clip_stands_in_the_place_of_eq_10",
         "test_steps.py::test_bilora_step_wants_layers_with_auxiliary_pairs",
         "test_steps.py::test_bilora_step_in_eval_mode_is_refused",
         "test_propositions.py::test_prop_2_one_ascent_step_gains_to_first_order")),
    "merge_lora_": Task(
        "bilora.py", ("merge_lora_", "_merged"), "(1)",
        "Put plain linear layers back, with W = W0 + s B1 A1; the auxiliary pair is dropped.",
        ("Add in float32 or wider, and round once.",
         "The plain layer is frozen, and in the mode of the adapted one.  One may have two names.",
         "Another module may share W0: do not write into it."),
        ("test_adapter.py::test_merge_in_float64", "test_adapter.py::test_merge_rounds_once",
         "test_adapter.py::test_merge_leaves_a_shared_base_weight_alone")),
    "power_rule": Task(
        "notes/methods.py", ("turn_perturbation_", "bilora_power_step"), "(A18)",
        "Block power iteration in the place of the paper's ascent and clip (note 5).",
        ("With orthonormal rows of A2, s G A2^T is the best B2 for them.",
         "s B2^T G turns the rows; a QR decomposition makes them orthonormal.",
         "Carry B2 over into the new rows before you scale, from the old A2 as it is.",
         "`_blend` has one norm for a list: all layers' B2 together, each A2 by itself."),
        ("test_power.py::test_at_a_fixed_gradient_it_reaches_the_optimum_of_prop_3",
         "test_power.py::test_every_step_keeps_the_rows_orthonormal_and_the_radius",
         "test_power.py::test_one_step_written_out")),
    "filter_normalised": Task(
        "notes/measures.py", ("filter_normalised",), "Fig. 4",
        "A random direction whose rows are as long as the weight's rows.",
        ("A row is a slice along the first dimension.", "The generator makes it repeatable."),
        ("test_measures.py::test_filter_normalised_directions",)),
    "worst_case": Task(
        "notes/measures.py", ("worst_case",), "(A1)",
        "Several steps of normalised ascent within a ball; the largest increase that they met.",
        ("One step is SAM's eps.", "Project back onto the ball after each step.",
         "Restore the weights."),
        ("test_measures.py::test_worst_case_of_a_linear_loss_is_its_slope",
         "test_measures.py::test_worst_case_is_the_best_that_was_met",
         "test_measures.py::test_worst_case_of_a_quadratic")),
    "hessian_vector": Task(
        "notes/measures.py", ("hessian_vector",), "-",
        "H v without H: the gradient of the inner product of gradient and v.",
        ("torch.autograd.grad(..., create_graph=True).", "The losses come in shares: add up."),
        ("test_measures.py::test_hessian_against_the_dense_one",))}

HOOK = '''

@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """A blank that a test meets on its way, without grading it, skips the test."""
    report = (yield).get_result()
    text = str(call.excinfo.value) if call.excinfo else ""
    if report.failed and text.endswith(": yours to write"):
        with open(item.config.rootpath / "blanks.json") as file:
            graders = json.load(file).get(text.split(":")[0], ())
        name = item.nodeid.split("[")[0].removeprefix("tests/")
        if name not in graders:
            report.outcome, report.longrepr = "skipped", (str(item.path), 0, f"needs {text}")
'''


# ------------------------------------------------------------------------------------- the copy

def blanked(source, task, functions):
    """The source with the bodies of these functions, "name" or "Class.name", replaced."""
    lines, wanted = source.splitlines(keepends=True), dict.fromkeys(functions)
    for node, name in definitions(ast.parse(source)):
        if name in wanted:
            wanted[name] = node
    for node in sorted(wanted.values(), key=lambda node: -node.lineno):
        first = node.body[0]
        has_text = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
        start = first.end_lineno if has_text else first.lineno - 1
        indent = " " * first.col_offset
        lines[start:node.end_lineno] = [
            f'{indent}raise NotImplementedError("{task}: yours to write")\n']
    return "".join(lines)

def definitions(tree, prefix=""):
    """(node, qualified name) of all functions at the top and in classes."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            yield from definitions(node, node.name + ".")
        elif isinstance(node, ast.FunctionDef):
            yield node, prefix + node.name

def sheets():
    """{number: (text, its tasks)} of the sheets of notes/assignments.md that have tasks."""
    found = {}
    with open(os.path.join(PROJECT, "notes", "assignments.md"), encoding="utf-8") as file:
        for text in re.split(r"^## (?=\d\. )", file.read(), flags=re.MULTILINE)[1:]:
            named = re.search(r"Tasks? (.*?)\. Hand", text)
            if named:
                text = re.sub(r"\]\((?=\w+\.md)", "](notes/", text.strip())  # links from the root
                found[int(text[0])] = f"# Sheet {text}\n\n", re.findall(r"`(\w+)`", named[1])
    return found

def of_sheet(number):
    """What make_copy takes for a sheet, beside the folder."""
    found = sheets()
    if number not in found:
        raise ValueError(f"--sheet is {number}; expected one with a task: "
                         f"{', '.join(map(str, found))}")
    text, names = found[number]
    later = [task for other, (_, tasks) in found.items() for task in tasks
             if other > number and task != NEEDED]
    return names, later, text

def sheet(names, text=""):
    """What to write, Markdown; text: that of the sheet."""
    text += ("# What to write\n\n`pip install -r requirements.txt` installs what is needed.  Each "
            "function below raises NotImplementedError.  Its docstring, or that of its class or "
            "caller, says what it takes and returns.  `python notes/assignment.py . --check` says "
            "what is done.\n")
    for name in dict.fromkeys(names):
        task = TASKS[name]
        functions = ", ".join(f"`{function}`" for function in task.functions)
        text += (f"\n## {name}\n\nIn `{task.file}`: {functions}.  Equations: {task.equation}.\n\n"
                 f"{task.text}\n\n")
        text += "".join(f"- {hint}\n" for hint in task.hints)
        tests = " \\\n        ".join(f"tests/{test}" for test in task.tests)
        text += f"\nGraded by:\n\n    pytest {tests}\n"
    return text

def make_copy(folder, names, later=(), text=""):
    """Write the folder, complete or not at all.  later: tasks that are blank and no task of this
    copy."""
    if os.path.lexists(folder):
        raise ValueError(f"{folder}: exists; expected the name of a new folder")
    parent = os.path.dirname(os.path.abspath(folder))
    os.makedirs(parent, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parent) as place:
        copy = os.path.join(place, "copy")
        os.makedirs(os.path.join(copy, "tests"))
        for name in (*FILES, *(os.path.join("tests", name) for name in TESTS)):
            source, target = os.path.join(PROJECT, name), os.path.join(copy, name)
            if os.path.isdir(source):
                shutil.copytree(source, target, ignore=LEFT_OUT)
            else:
                shutil.copy(source, target)
        for name in (*names, *later):
            edit(os.path.join(copy, TASKS[name].file),
                 lambda source: blanked(source, name, TASKS[name].functions))
        edit(os.path.join(copy, "tests", "conftest.py"),
             lambda source: source.removesuffix(HOOK) + HOOK)
        write(os.path.join(copy, SHEET), sheet(names, text))
        write(os.path.join(copy, BLANKS), json.dumps({name: TASKS[name].tests for name in names}))
        os.rename(copy, folder)

def edit(path, change):
    with open(path, encoding="utf-8") as file:
        source = file.read()
    write(path, change(source))

def write(path, text):
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)


# ------------------------------------------------------------------------------------ the check

def check(folder, names=None):
    """Run the tests that grade these tasks, by default those that a copy has blanked; {task: (how
    many pass, of how many, what the others say)}."""
    names = list(dict.fromkeys(names or blanks_of(folder)))
    with tempfile.TemporaryDirectory() as place:
        fresh = os.path.join(place, "copy")
        make_copy(fresh, names)
        for file in dict.fromkeys(TASKS[name].file for name in names):
            shutil.copy(os.path.join(folder, file), os.path.join(fresh, file))
        cases = run_tests(fresh, [test for name in names for test in TASKS[name].tests])
        return {name: grade(cases, TASKS[name].tests, lines_of(fresh, TASKS[name]))
                for name in names}

def blanks_of(folder):
    """The tasks of a copy."""
    path, names = os.path.join(folder, BLANKS), []
    if os.path.exists(path):
        with open(path, encoding="utf-8") as file:
            names = [name for name in json.load(file) if name in TASKS]
    if not names:
        raise ValueError(f"{path}: names no task; expected a folder that this command has written, "
                         "or --blank with the tasks")
    return names

def run_tests(folder, tests):
    """The cases of pytest's report on these tests of a copy."""
    with tempfile.TemporaryDirectory() as place:
        report = os.path.join(place, "report.xml")
        names = dict.fromkeys(f"tests/{test}" for test in tests)
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider",
                   f"--junitxml={report}", *names]
        try:
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True,
                                  timeout=LIMIT, env={**os.environ, "OMP_NUM_THREADS": "1"})
        except subprocess.TimeoutExpired:
            raise ValueError(f"the tests did not end within {LIMIT} seconds; expected a step "
                             "without an endless loop") from None
        if not os.path.exists(report):
            raise ValueError(f"the tests could not start: {last_error(done.stderr)}")
        return list(ET.parse(report).iter("testcase"))

def last_error(text):
    """The place and the error at the end of what pytest or Python printed."""
    text = re.sub(r'File "\S*/copy/', 'File "', text)  # the folder of the check is gone
    lines = [line.removeprefix("E").strip() for line in text.splitlines() if line.strip()]
    places = [line for line in lines if line.startswith("File ")]
    places = places or [line for line in lines if re.match(r"(?!tests/|/)\S+\.py:\d+: in ", line)]
    return " ".join([*places[-1:], *lines[-1:]])

def grade(cases, tests, own_lines=()):
    """own_lines: the lines of the task's functions, "file:line"."""
    own = [case for case in cases if name_of(case) in tests]
    own.sort(key=lambda case: tests.index(name_of(case)))
    bad = [case for case in own or cases if len(case)]  # own is empty where a file has an error
    messages = {name_of(case): message_of(case, own_lines)
                for case in reversed(bad)}  # one a test, the first
    return len(own or bad) - len(bad), len(own), list(messages.values())[::-1]

def name_of(case):
    """file::name of a test, without its parameters."""
    file = (case.get("classname") or "").split(".")[-1]
    return f"{file}.py::{case.get('name').split('[')[0]}"

def lines_of(folder, task):
    """{"file:line"} of the task's functions."""
    with open(os.path.join(folder, task.file), encoding="utf-8") as file:
        source = file.read()
    try:
        tree = ast.parse(source)
    except SyntaxError:  # which the report has
        return set()
    return {f"{task.file}:{line}" for node, name in definitions(tree) if name in task.functions
            for line in range(node.lineno, node.end_lineno + 1)}

def message_of(case, own_lines):
    """Its name, the first line of what it says, and where an error outside of the tests arose: the
    last line of own_lines on the way to it, or the last one of the project.  Of a file with an
    error the error."""
    lines = (case[0].get("message") or "").strip().splitlines()
    if lines and lines[0].endswith("pattern did not match."):  # then what was expected and found
        lines = [" ".join(line.strip() for line in lines[:3])]
    if lines[:1] == ["collection failure"]:
        return last_error(case[0].text)
    places = re.findall(r"^(\S+\.py:\d+): ", case[0].text or "", re.MULTILINE)
    own = [place for place in places if not place.startswith(("/", "tests"))]
    own = [place for place in own if place in own_lines] or own
    where = f" ({own[-1]})" if own and not places[-1].startswith("tests") else ""
    return f"{name_of(case)}: {lines[0] if lines else case[0].tag}{where}"

def report_of(found):
    for name, (passed, count, messages) in found.items():
        missing = [text.split(": yours to write")[0].split()[-1] for text in messages
                   if "yours to write" in text]
        if passed == count > 0:
            print(f"{name}: done; {count} of {count} cases pass")
        elif not count:
            print(f"{name}: its tests could not start\n    {messages[0]}")
        elif missing:
            reason = "not begun" if name in missing else f"waits for {missing[0]}, not begun"
            print(f"{name}: {reason}; {passed} of {count} cases pass")
        else:
            print(f"{name}: not yet; {passed} of {count} cases pass")
            print("".join(f"    {message}\n" for message in messages), end="")


class Parser(argparse.ArgumentParser):
    """That of the scripts, which cannot be imported where a student's file has an error."""
    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")

def main(argv=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", help="of the copy")
    tasks = parser.add_mutually_exclusive_group()
    tasks.add_argument("--sheet", type=int, help="its tasks; with --check instead of the copy's")
    tasks.add_argument("--blank", nargs="+", choices=TASKS, metavar="TASK",
                        help="tasks (default: all; with --check those of the copy)")
    parser.add_argument("--check", action="store_true", help="run the tests that grade a copy")
    parser.add_argument("--list", action="store_true", help="print the tasks")
    options = parser.parse_args(argv)
    try:
        chosen = None if options.sheet is None else of_sheet(options.sheet)
        if options.list:
            print("\n".join(f"{name}: {task.text}" for name, task in TASKS.items()))
        elif not options.folder:
            parser.error("expected the folder of the copy")
        elif options.check:
            found = check(options.folder, options.blank or chosen and chosen[0])
            report_of(found)
            return int(any(passed < count or not count for passed, count, _ in found.values()))
        else:
            wanted = chosen or [options.blank or [*TASKS]]
            make_copy(options.folder, *wanted)
            print(f"{options.folder}: {', '.join(wanted[0])} to write; begin with {SHEET}")
    except (ValueError, OSError) as error:
        parser.error(str(error))
    return 0

if __name__ == "__main__":
    sys.exit(main())
