"""Statistics, tables and figure of notes/9_study.md, from the record that notes/study.py writes.

The record is {"chosen": {cell: {row: choice}}, "runs": {cell: {setting: {seed: what is kept}}},
"flat": {cell: {seed: {row: what notes/study_flat.py measures}}}}.
"""

import functools
import math
import os
import re
import statistics

import numpy as np
from matplotlib.figure import Figure

from study_plan import (ALL, CELLS, CONTRASTS, CURVES, FLAT, FLAT_SEEDS, MAIN, NOISY, NOT_PLANNED,
                        RADII, RANKS, RATES, ROWS, SLOWER, TUNING_SEEDS, folder_name, full_settings,
                        setting_in, sets_of)


# --------------------------------------------------------------------------------- statistics

@functools.cache
def t_quantile(level, df):
    """t with P(|T| <= t) = level of Student's distribution.  With T = sqrt(df) tan(x) the density
    is proportional to cos(x)^(df - 1) on (-pi / 2, pi / 2)."""
    x = np.linspace(0, math.pi / 2, 1_000_001)
    density = np.cos(x) ** (df - 1)
    share = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return math.sqrt(df) * math.tan(np.interp(level, share / share[-1], x))

def sign_test(differences):
    """(how many are above 0, how many are not 0, two-sided p)."""
    wins, losses = (sum(sign * d > 0 for d in differences) for sign in (1, -1))
    n, fewer = wins + losses, min(wins, losses)
    return wins, n, min(1.0, 2 * sum(math.comb(n, k) for k in range(fewer + 1)) / 2 ** n)

def interval(values, level=0.95):
    """(mean, half of the width of its interval; None of one value)."""
    if len(values) < 2:
        return statistics.fmean(values), None
    error = statistics.stdev(values) / math.sqrt(len(values))
    return statistics.fmean(values), t_quantile(level, len(values) - 1) * error

def verdict(mean, half, margin=0.01):
    """The words of the plan."""
    if half is None:
        return "open"
    words = {"positive": mean - half > 0, "negative": mean + half < 0,
             "equal": -margin <= mean - half and mean + half <= margin}
    return ", ".join(word for word, holds in words.items() if holds) or "open"

def spearman(x, y):
    """Spearman's rank correlation; equal values share their mean rank.  Where all of x or of y are
    equal it is 0."""
    ranks = [np.array([np.mean(np.flatnonzero(np.sort(z) == value)) for value in z])
             for z in (x, y)]
    return float(np.corrcoef(*ranks)[0, 1]) if all(r.std() > 0 for r in ranks) else 0.0


# ------------------------------------------------------------------------- tables and figure

DERIVED = STOPPED, BEST = "lora, epoch chosen on held", "lora, best epoch"
CHEAP = ("label-smoothing", "head-decay", "lora-rate", STOPPED)  # without a perturbation
CURVE_ROWS = (*MAIN, "lora-sam-rate")  # in draw_curves, each with a colour of its own
STYLES = {  # in draw_fit, the last one on top
    "others": {"marker": "o", "color": "grey"},
    "label-smoothing": {"marker": "o", "color": "grey", "fillstyle": "none"},
    "bi-lora": {"marker": "o", "color": "C2"}, "lora-sam": {"marker": "^", "color": "C0"},
    "lora": {"marker": "D", "color": "C3"}}
# Pairs of rows whose difference stands below a table.
BESIDE = [*(("lora-sam", row) for row in (*DERIVED, "lora-rate")), ("lora-rate", STOPPED),
          ("lora-sam-rate", "lora-rate"), ("lora-sam-rate", "lora-sam")]

def rows_of(cell):
    """A cell's rows, and those that come from LoRA's runs, where each epoch is scored."""
    derived = DERIVED if "held" in CELLS[cell].parts else (BEST,)
    return [*CELLS[cell].rows, *(() if CELLS[cell].task == "gsm8k" else derived)]

def runs_of(found, cell, row):
    """({option: value}, {seed: what is kept}) of a row, the plan's seeds alone; (None, {}) where
    its setting is not chosen yet."""
    setting = setting_in(cell, row, found["chosen"])
    if setting is None:
        return None, {}
    runs = found["runs"].get(cell, {}).get(folder_name(ROWS[row].method, setting), {})
    return setting, {seed: kept for seed, kept in runs.items() if int(seed) < CELLS[cell].seeds}

def scores_of(found, cell, row, part):
    """{seed: score} on an evaluation set after the last epoch, or after that which STOPPED and BEST
    name."""
    _, runs = runs_of(found, cell, "lora" if row in DERIVED else row)
    scores = {}
    for seed, kept in runs.items():
        values = kept["scores"].get(part)
        if values:
            judges = {STOPPED: kept["scores"].get("held"), BEST: values}
            scores[seed] = values[int(np.argmax(judges[row])) if row in DERIVED else -1]
    return scores

def difference(found, cell, a, b, part):
    """{seed: score of a - score of b}."""
    return minus(*(scores_of(found, cell, row, part) for row in (a, b)))

def minus(one, other):
    return {seed: one[seed] - other[seed] for seed in one if seed in other}

def counting_set(cell):
    """The set whose score counts."""
    if CELLS[cell].task == "gsm8k":
        return "gold"
    return "rest" if "rest" in CELLS[cell].parts else "dev"

def number(mean, half, sign=""):
    return f"{mean:{sign}.4f}" + ("" if half is None else f" ± {half:.4f}")

def table(found, cell, part):
    """Markdown: a row's setting, score, spread, difference to LoRA, sign test; "" without runs."""
    lines = [line_of(found, cell, row, part) for row in rows_of(cell)]
    lines = [line for line in lines if line]
    if not lines:
        return ""
    head = ["row", "setting", part, "spread", "minus LoRA's", "higher, p"]
    body = "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * 6, *lines])
    compared = sum(bool(line[4]) and line[0] != BEST for line in lines)
    seeds = len(scores_of(found, cell, "lora", part))
    beyond = ""
    for one, other in BESIDE:
        gain = list(difference(found, cell, one, other, part).values())
        if {one, other} <= set(rows_of(cell)) and len(gain) > 1:
            beyond += f" {one} minus {other}: {number(*interval(gain), '+')}, not in the plan."
    what = "loss of a token, less is better" if part == "gold" else "last epoch"
    return (f"\n## {cell}, {part}\n\n{body}\n\n{what}; n = {seeds} seeds; 95 % intervals; "
            f"{compared} comparisons; {diverged(found, cell)} runs diverged, tuning included."
            f"{beyond}{remarks(found, cell) if part == counting_set(cell) else ''}\n")

def remarks(found, cell):
    """The training loss of the rows' last epoch; and how well the rise orders the scores, over the
    rows with LoRA's seeds and runs of their own, from ten rows on."""
    losses, points = [], set()
    for row in CELLS[cell].rows:
        runs = runs_of(found, cell, row)[1].values()
        loss, rises = loss_of(runs), [kept.get("rise") for kept in runs]
        if loss is not None:
            losses.append(f"{row} {loss:.3f}")
        if rises and None not in rises and not seeds_of(found, cell, row, counting_set(cell)):
            scores = scores_of(found, cell, row, counting_set(cell)).values()
            points.add((statistics.fmean(rises), statistics.fmean(scores)))
    text = f" Training loss of the last epoch: {', '.join(losses)}."
    if len(points) >= 10:
        text += (f" Rank correlation of rise and score over {len(points)} rows: "
                 f"{spearman(*zip(*points)):+.2f}, not in the plan.")
    return text

def loss_of(runs):
    """Mean training loss of the last epoch; None where there is no run, or one diverged."""
    if runs and all("loss" in kept for kept in runs):
        return statistics.fmean(kept["loss"][-1] for kept in runs)
    return None

def line_of(found, cell, row, part):
    values = list(scores_of(found, cell, row, part).values())
    if not values:
        return None
    spread = f"{statistics.stdev(values):.4f}" if len(values) > 1 else ""
    setting = {} if row in DERIVED else runs_of(found, cell, row)[0]
    text, cells = ", ".join(f"{key} {value}" for key, value in setting.items()), ["", ""]
    paired = list(difference(found, cell, row, "lora", part).values())
    if row != "lora" and paired:
        higher, n, p = sign_test(paired)
        cells = [number(*interval(paired), "+"), f"{higher} of {n}, {p:.2g}"]
    return [row + seeds_of(found, cell, row, part), text, f"{statistics.fmean(values):.4f}", spread,
            *cells]

def seeds_of(found, cell, row, part):
    """" (n = 4)" where a row has other seeds than LoRA, as it is not complete yet."""
    own, all_of = (len(scores_of(found, cell, name, part)) for name in (row, "lora"))
    return "" if own == all_of else f" (n = {own})"

def diverged(found, cell):
    settings = found["runs"].get(cell, {}).values()
    return sum("diverged" in kept for runs in settings for kept in runs.values())

def contrasts(found):
    """Markdown: every contrast of the plan, at the level of its hypothesis, and what follows."""
    head = ["", "contrast", "n", "difference", "clipped steps", "verdict"]
    lines, said = [head, ["---"] * 6], {}
    for hypothesis, items in sorted({**CONTRASTS, "H5": [NOISY]}.items()):
        judge = correlation if hypothesis == "H5" else contrast
        judged = [judge(found, hypothesis, item, len(items)) for item in items]
        lines += [line for line, _ in judged]
        said[hypothesis] = outcome([word for _, word in judged])
    others = [cell for cell in found.get("flat", {}) if cell != NOISY]
    lines += [correlation(found, "not the plan's", cell, 1)[0] for cell in others]
    lines += [contrast(found, label, item, 1)[0] for label in NOT_PLANNED
              for item in NOT_PLANNED[label]]
    body = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    words = "".join(f"- {hypothesis}: {said[hypothesis]}\n" for hypothesis in said)
    return (f"\n## Contrasts\n\n{body}\nThe level of an interval is 1 - 0.05 / k, with k contrasts "
            f"a hypothesis; of those that are not the plan's 0.95.\n\n{words}")

def contrast(found, hypothesis, item, k):
    """(its line, what it says of the hypothesis).  It is open until all of its seeds are there."""
    values, (cell, row, _) = values_of(found, item), item[0]
    mean, half = interval(values, 1 - 0.05 / k) if values else (0.0, None)
    complete = len(values) == min(CELLS[part[0]].seeds for part in item)
    words = verdict(mean, half) if complete else "open"
    clip = clipped(found, cell, row) if hypothesis[:2] in ("H1", "H2") else None
    said = says(hypothesis, words, clip) if complete else "open"
    if complete and hypothesis == "H4" and not gains(found, row, k):
        said = "does not count"
    name = "; less ".join(f"{cell}: {a} - {b}" for cell, a, b in item)
    shown = number(mean, half, "+") if values else ""
    share = "" if clip is None else f"{clip:.2%}"
    return [hypothesis, name, str(len(values)), shown, share, words], said

def values_of(found, item):
    """[difference within a seed] of a contrast."""
    parts = [difference(found, cell, a, b, counting_set(cell)) for cell, a, b in item]
    return list((minus(*parts) if len(parts) > 1 else parts[0]).values())

def clipped(found, cell, row):
    """Share of all steps of a row's runs in which the clip acted; None where no run has one."""
    runs = runs_of(found, cell, row)[1].values()
    shares = [kept["clipped"] for kept in runs if "clipped" in kept]
    return statistics.fmean(shares) if shares else None

def gains(found, row, k):
    """Is the gain over LoRA in cell 2 positive?"""
    values = values_of(found, [(NOISY, row, "lora")])
    return (len(values) == CELLS[NOISY].seeds
            and "positive" in verdict(*interval(values, 1 - 0.05 / k)))

def says(hypothesis, words, clip):
    """What a contrast's verdict, and the share of clipped steps, say by the plan: "holds",
    "refuted" or "open"."""
    if hypothesis == "H1" and clip:
        return "refuted"
    binds = hypothesis != "H2" or clip is not None and clip > 0.5
    if words == "open" or not binds:
        return "open"
    wanted = {"H1": "equal" in words, "H2": "positive" not in words}
    return "holds" if wanted.get(hypothesis, "positive" in words) else "refuted"

def outcome(said):
    """Of a hypothesis, from what its contrasts say: one that refutes it is enough, then an open
    one; where none counts it is open."""
    return next((word for word in ("refuted", "open", "holds") if word in said), "open")

def correlation(found, hypothesis, cell, _):
    """H5's line, and what it says: Spearman's correlation of eigenvalue and score in each seed."""
    seeds = found.get("flat", {}).get(cell, {})
    values = [spearman(*([run[key] for run in rows.values()] for key in ("eigenvalue", "score")))
              for rows in seeds.values()]
    mean, said = statistics.fmean(values) if values else 0.0, "open"
    if len(values) >= FLAT_SEEDS:
        said = "holds" if round(mean, 9) > -0.5 else "refuted"  # -0.5 may come out above itself
    shown = f"{mean:+.2f} ({', '.join(f'{value:+.2f}' for value in values)})" if values else ""
    name = f"{cell}: rank correlation of eigenvalue and score"
    return [hypothesis, name, str(len(values)), shown, "", said], said

def flat_table(found, cell):
    """Markdown: a row's means over the seeds, at equal training loss; "" without runs."""
    seeds, keys = found.get("flat", {}).get(cell, {}), ("epoch", "loss", "eigenvalue", "residual")
    if not seeds:
        return ""
    text = f"\n## {cell}, largest eigenvalue at equal training loss\n\n"
    text += f"| row | {' | '.join(keys)} | score |\n|---|---|---|---|---|---|\n"
    for row in FLAT:
        means = [statistics.fmean(rows[row][key] for rows in seeds.values())
                 for key in (*keys, "score")]
        text += f"| {row} | {' | '.join(f'{mean:.4g}' for mean in means)} |\n"
    return text + f"\nMeans over {len(seeds)} seeds; the residual is that of the eigenvalue.\n"

def gain_of(found, cell, row):
    """(mean gain over LoRA on the set that counts, half of its 95 % interval), or None before there
    are two seeds."""
    gain = list(difference(found, cell, row, "lora", counting_set(cell)).values())
    return interval(gain) if len(gain) > 1 else None

def whole_cells(found):
    """Those with all rows of the plan, and runs."""
    return [cell for cell in CELLS if set(ALL) <= set(CELLS[cell].rows) and found["runs"].get(cell)]

def draw_gains(found, path):
    """A panel for each cell of sentences, a line of its own for each row, with 95 % intervals."""
    rows, cells = (*ALL[1:], STOPPED), whole_cells(found)
    figure = Figure(figsize=(3.4 + 3 * len(cells), 5.2), layout="constrained")
    axes = figure.subplots(1, max(1, len(cells)), sharey=True, squeeze=False)[0]
    for axis, cell in zip(axes, cells):
        for place, row in enumerate(rows):
            gain = gain_of(found, cell, row)
            if gain:
                axis.errorbar(gain[0], place, xerr=gain[1], marker="o", capsize=3,
                              color=colour_of(row))
        axis.axvline(0, color="grey", linestyle=":")
        axis.set(title=cell, xlabel="accuracy minus LoRA's")
        axis.locator_params(axis="x", nbins=5)
    axes[0].set_yticks(range(len(rows)), rows)
    axes[0].invert_yaxis()
    write_figure(figure, path)

def draw_fit(found, path):
    """Accuracy on `held` against the training loss of the last epoch: a point for each setting of
    the tuning, a panel for each cell with all rows.  A vertical line is at the loss of a model that
    knows the right labels and the share of wrong ones."""
    cells = whole_cells(found)
    if not cells:
        return
    figure = Figure(figsize=(1 + 4 * len(cells), 4), layout="constrained")
    axes = figure.subplots(1, len(cells), squeeze=False)[0]
    for axis, cell in zip(axes, cells):
        for method, style in STYLES.items():
            axis.plot(*fits(found, cell, method), linestyle="none", label=method, **style)
        wrong = full_settings(CELLS[cell]).get("label_noise")
        if wrong:
            known = -sum(share * math.log(share) for share in (wrong, 1 - wrong))
            axis.axvline(known, color="grey", linestyle=":")
        axis.set(title=cell, xlabel="training loss of the last epoch", ylabel="accuracy on held")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper")
    write_figure(figure, path)

def fits(found, cell, method):
    """Training losses and accuracies on `held` of its settings, means over the tuning seeds; a
    setting with a run that is missing, or diverged, is left out."""
    points = []
    for name, runs in found["runs"].get(cell, {}).items():
        own = [runs[str(seed)] for seed in TUNING_SEEDS if str(seed) in runs]
        label = name.split("_")[0]
        if label not in STYLES:
            label = "others"
        loss = loss_of(own)
        if label == method and len(own) == len(TUNING_SEEDS) and loss is not None:
            points.append([loss, statistics.fmean(kept["scores"]["held"][-1] for kept in own)])
    return np.array(points).reshape(-1, 2).T

def colour_of(row):
    """One for the paper's methods, one for what explains a gain without a perturbation, and one."""
    if row in CHEAP:
        return "C3"
    return "C0" if ROWS[row].method in ("lora-sam", "bi-lora") else "C7"

def draw_curves(found, path):
    """Gain over LoRA against n and the share of wrong labels, a line a row, with 95 % intervals.
    Rows, panels and files of fewer than two points are left out."""
    panels = {title: curves(found, key, cells) for title, (key, cells) in CURVES.items()}
    panels = {title: lines for title, lines in panels.items() if lines}
    if not panels:
        return
    figure = Figure(figsize=(3 + 3 * len(panels), 4), layout="constrained")
    axes, handles = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0], {}
    for axis, (title, lines) in zip(axes, panels.items()):
        of_rows = CURVES[title][0] == "limit"
        for row, points in lines.items():
            x, y, half = zip(*points)
            handles[row] = axis.errorbar(x, y, half, marker="o", capsize=3,
                                         color=f"C{CURVE_ROWS.index(row)}")
        axis.axhline(0, color="grey", linestyle=":")
        axis.set(title=title, xscale="log" if of_rows else "linear",
                 xlabel="training rows" if of_rows else "share of wrong labels")
        ticks = sorted({point[0] for points in lines.values() for point in points})
        axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axis.minorticks_off()
    axes[0].set_ylabel("accuracy minus LoRA's")
    drawn = [row for row in CURVE_ROWS if row in handles]
    figure.legend([handles[row] for row in drawn], drawn, loc="outside right upper")
    write_figure(figure, path)

def curves(found, key, cells):
    """{row: [(setting, gain, half of its interval)]} of the rows with two points or more."""
    lines = {}
    for row in CURVE_ROWS:
        gains = {full_settings(CELLS[cell])[key]: gain_of(found, cell, row) for cell in cells}
        points = [(x, *gain) for x, gain in gains.items() if gain]
        if row != "lora" and len(points) > 1:
            lines[row] = points
    return lines

def write_figure(figure, path):
    figure.savefig(path + ".tmp", format="png", dpi=100)
    os.replace(path + ".tmp", path)

MARK = re.compile(r"^<!-- study: (\S+) (.*?) -->\n.*?^<!-- end -->\n", re.DOTALL | re.MULTILINE)

def filled(text, found):
    """The text with its tables made anew: between `<!-- study: CELLS ROWS -->` and `<!-- end -->`;
    CELLS and ROWS have commas between them, ROWS may be *.  One cell: setting, score, difference to
    LoRA, sign test and rise (exact matches of word problems); several: the differences.  `ranks`
    in place of CELLS: the demo with other ranks; `grid` in place of ROWS: radius and rate."""
    def new(match):
        cells, rows = match[1].split(","), match[2].split(",")
        if rows == ["*"]:
            rows = rows_of(cells[0])
        if cells == ["ranks"]:
            lines = ranks(found, rows)
        elif rows == ["grid"]:
            lines = [line for cell in cells for line in grid(found, cell)]
            lines = [["cell", "radius", *(f"rate {rate}" for rate in SLOWER)], ["---"] * 5, *lines]
        elif len(cells) == 1:
            lines = brief(found, cells[0], rows)
        else:
            lines = side_by_side(found, cells, rows)
        body = "".join(f"| {' | '.join(line)} |\n" for line in lines)
        return f"<!-- study: {match[1]} {match[2]} -->\n{body}<!-- end -->\n"
    return MARK.sub(new, text)

def brief(found, cell, rows):
    """Lines of a table of one cell, on the set that counts; of word problems the loss of a token of
    the gold answers, and in the last column the share of problems that were answered right."""
    part, digits = counting_set(cell), digits_of(cell)
    of_words = ("gold loss", "exact match") if part == "gold" else ("score", "rise")
    lines = [["row", "setting", of_words[0], "minus LoRA's", "higher", of_words[1]], ["---"] * 6]
    for row in [row for row in rows if scores_of(found, cell, row, part)]:
        setting, runs = ({}, {}) if row in DERIVED else runs_of(found, cell, row)
        score = statistics.fmean(scores_of(found, cell, row, part).values())
        gain = higher = ""
        if row != "lora":
            gain = short(found, cell, row)
            wins, n, _ = sign_test(list(difference(found, cell, row, "lora", part).values()))
            higher = f"{wins} of {n}"
        last = [kept["rise"] for kept in runs.values() if kept.get("rise") is not None]
        if part == "gold":
            last = scores_of(found, cell, row, "test").values()
        mean = f"{statistics.fmean(last):.3f}" if last else ""
        text = ", ".join(f"{key} {value}" for key, value in setting.items())
        name = f"`{row}`" + seeds_of(found, cell, row, part)
        lines.append([name, text, f"{score:.{digits}f}", gain, higher, mean])
    return lines

def digits_of(cell):
    """After the point: losses of word problems may differ by less than a thousandth."""
    return 4 if counting_set(cell) == "gold" else 3

def short(found, cell, row):
    """A row's gain over LoRA, "" before there are two seeds."""
    gain, digits = gain_of(found, cell, row), digits_of(cell)
    return f"{gain[0]:+.{digits}f} ± {gain[1]:.{digits}f}" if gain else ""

def side_by_side(found, cells, rows):
    """Lines of a table of several cells: LoRA's score, and the differences to it."""
    lines = [["", *(f"{cell}, {CELLS[cell].seeds} seeds" for cell in cells)],
             ["---"] * (len(cells) + 1)]
    for row in rows:
        own = [short(found, cell, row) for cell in cells if row != "lora"]
        if row == "lora":
            scores = [scores_of(found, cell, row, counting_set(cell)).values() for cell in cells]
            own = [f"{statistics.fmean(values):.3f}" if values else "" for values in scores]
        lines.append([f"`{row}`", *own])
    return lines

def ranks(found, rows):
    """Lines of a table of the demo with other ranks: LoRA's score, its difference to that with the
    demo's own, the rows' gains over LoRA, and standard deviations over the seeds, LoRA's first."""
    lines = [["cell", "`lora`", "minus `demo`'s", *(f"`{row}`" for row in rows), "spread"]]
    lines.append(["---"] * len(lines[0]))
    own = scores_of(found, "demo", "lora", "dev")
    for cell in RANKS:
        scores = [list(scores_of(found, cell, row, "dev").values()) for row in ("lora", *rows)]
        change = list(minus(scores_of(found, cell, "lora", "dev"), own).values())
        if len(change) > 1:
            mean, half = interval(change)
            spread = [f"{statistics.stdev(values):.3f}" for values in scores if values]
            lines.append([f"`{cell}`", f"{statistics.fmean(scores[0]):.3f}",
                          "" if cell == "demo" else f"{mean:+.3f} ± {half:.3f}",
                          *(short(found, cell, row) for row in rows), ", ".join(spread)])
    return lines

def grid(found, cell):
    """Lines of a table of radius and rate: mean scores on `held` over the tuning seeds."""
    choices, means, lines = found["chosen"].get(cell, {}), {}, []
    for row in RATES:
        if row in choices:
            means |= choices[row]["means"]
    for method, setting in ("lora", {}), *(("lora-sam", {"rho": rho}) for rho in RADII):
        names = [folder_name(method, {**setting, "rate": rate}) for rate in SLOWER]
        lines.append([f"`{cell}`", str(setting.get("rho", "0 (LoRA)")),
                      *(f"{means[name]:.3f}" if name in means else "" for name in names)])
    return lines

def all_tables(found):
    """The whole report, Markdown."""
    text = "# The study: all tables\n"
    for name, cell in CELLS.items():
        parts = ("test", "gold") if cell.task == "gsm8k" else sets_of(cell)
        text += "".join(table(found, name, part) for part in parts if part != "held")
        text += flat_table(found, name)
    return text + contrasts(found)
