"""The report's page: one HTML file with its figures inside, which asks the network for nothing."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from .compare import Arm, Comparison, Difference, Group, signed
from .style import css_variables

_MANY = 6  # undecided arms, which are then told in one sentence


@dataclass(frozen=True)
class Shown:
    """A figure on the page, or a sentence in its place."""

    title: str
    caption: str  # without a figure: why there is none
    svg: str | None
    is_wide: bool = False


def page(
    name: str,
    groups: Sequence[tuple[Group, Sequence[Shown]]],
    schedules: Shown | None,
    left_out: Sequence[str],
    root: Path,
) -> str:
    """The page as text. `left_out`: runs that were not used, and why."""
    sections = [_group(group, figures, root) for group, figures in groups]
    if schedules is not None:
        sections.append(f"<section><h2>The schedules</h2>{_figure(schedules)}</section>")
    if left_out:
        items = "".join(f"<li>{escape(line)}</li>" for line in left_out)
        sections.append(
            f'<section class="warning"><h2>Not used</h2><p>These runs are in no number and no '
            f"figure above.</p><ul>{items}</ul></section>"
        )
    runs = len({run.path for group, _ in groups for arm in group.arms for run in arm.runs})
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{escape(name)}: does freezing pay?</title>
<style>{_CSS}</style>
</head>
<body>
<header>
<p class="name">{escape(name)} · {runs} run{"s" * (runs != 1)}</p>
<h1>Does freezing pay?</h1>
<p class="lead">Freezing layers saves time, and so does training for fewer steps. Each run with
FreezeOut is therefore compared with an ordinary run that takes about as long (within 3 %).</p>
</header>
<main>
{"".join(sections)}
<section class="method"><h2>How to read this</h2>{_METHOD}</section>
</main>
</body>
</html>
"""


def _group(group: Group, figures: Sequence[Shown], root: Path) -> str:
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in group.notes)
    absent = "".join(
        f'<p class="note">No figure “{escape(f.title)}”: {escape(f.caption)}</p>'
        for f in figures
        if not f.svg
    )
    return (
        f'<section><h2>{escape(group.title)}</h2><p class="sub">{escape(group.subtitle)}</p>'
        f"{_verdicts(group.comparisons)}{_table(group)}{notes}"
        f'<div class="figures">{"".join(_figure(f) for f in figures if f.svg)}</div>'
        f"{absent}{_runs(group, root)}</section>"
    )


def _verdicts(comparisons: Sequence[Comparison]) -> str:
    """A sentence for each arm; of many, for those that show something, and one for the rest."""
    quiet = [
        c
        for c in comparisons
        if c.to_rival is not None and c.to_rival.low is not None and c.to_rival.shows == "nothing"
    ]
    told = [c for c in comparisons if c not in quiet] if len(quiet) > _MANY else comparisons
    items = [
        _verdict(c.to_rival.shows if c.to_rival else "nothing", c.arm.label, c.sentence)
        for c in told
    ]
    if len(told) < len(comparisons):
        labels = ", ".join(c.arm.label for c in quiet)
        sentence = (
            f"No difference to an ordinary run of the same time can be shown for {labels}; their "
            "intervals are in the table."
        )
        items.append(_verdict("nothing", f"{len(quiet)} of {len(comparisons)} arms", sentence))
    return f'<ul class="verdicts">{"".join(items)}</ul>' if items else ""


def _verdict(shows: str, label: str, sentence: str) -> str:
    word = {"better": "pays", "worse": "does not pay", "nothing": "undecided"}[shows]
    return (
        f'<li><span class="tag {shows}">{word}</span> '
        f"<strong>{escape(label)}.</strong> {escape(sentence)}</li>"
    )


def _table(group: Group) -> str:
    by_arm = {id(comparison.arm): comparison for comparison in group.comparisons}
    rival_of = {
        id(arm): [c.arm.label for c in group.comparisons if c.rival is arm] for arm in group.arms
    }
    error = "Test error" if group.is_test else "Validation error"
    rows = "".join(_row(arm, by_arm.get(id(arm)), rival_of[id(arm)]) for arm in group.arms)
    return f"""<div class="scroll"><table>
<thead><tr><th rowspan="2" scope="col">Arm</th><th rowspan="2" scope="col">Steps</th>
<th colspan="3" scope="colgroup">{error}, %</th>
<th rowspan="2" scope="col">Training<br>seconds</th><th rowspan="2" scope="col">Time<br>saved</th>
<th colspan="2" scope="colgroup">Difference in points [95 % interval] to</th></tr>
<tr><th scope="col">mean</th><th scope="col">sd</th><th scope="col">n</th>
<th scope="col">ordinary run of its time</th><th scope="col">full-length run</th></tr></thead>
<tbody>{rows}</tbody></table></div>"""


def _row(arm: Arm, comparison: Comparison | None, rival_of: Sequence[str]) -> str:
    cells = [
        f"{arm.steps:,}",
        "–" if arm.mean is None else f"{100 * arm.mean:.2f}",
        "–" if arm.sd is None else f"{100 * arm.sd:.2f}",
        str(len(arm.errors)),
        f"{arm.seconds:,.1f}" if arm.seconds < 1000 else f"{arm.seconds:,.0f}",
        "–" if not arm.time_saved else f"{100 * arm.time_saved:.1f} %".replace("-", "−"),
        _difference(comparison.to_rival, len(arm.errors)) if comparison else "",
        _difference(comparison.to_full, len(arm.errors)) if comparison else "",
    ]
    values = "".join(f"<td>{cell}</td>" for cell in cells)
    kind = "freezes" if arm.freezes else "ordinary"
    of = f'<span class="of">time of {escape(", ".join(rival_of))}</span>' if rival_of else ""
    name = escape(arm.label) + of
    return f'<tr class="{kind}"><th scope="row">{name}</th>{values}</tr>'


def _difference(found: Difference | None, seeds: int) -> str:
    """With the number of seeds that it is over, where the arm has another."""
    if found is None:
        return "–"
    over = "" if found.n == seeds else f' <span class="over">n={found.n}</span>'
    if found.low is None or found.high is None:
        return signed(found.mean) + over
    return (
        f'{signed(found.mean)} <span class="range">[{signed(found.low)}, {signed(found.high)}]'
        f"</span>{over}"
    )


def _figure(shown: Shown) -> str:
    kind = ' class="wide"' if shown.is_wide else ""
    return (
        f"<figure{kind}><h3>{escape(shown.title)}</h3>{shown.svg}"
        f"<figcaption>{escape(shown.caption)}</figcaption></figure>"
    )


def _runs(group: Group, root: Path) -> str:
    rows = "".join(
        f"<tr><th scope='row'>{escape(str(_relative(run.path, root)))}</th>"
        f"<td>{escape(arm.label)}</td><td>{run.seed}</td><td>{run.total_steps:,}</td>"
        f"<td>{'–' if run.error is None else f'{100 * run.error:.2f}'}</td>"
        f"<td>{run.seconds:,.1f}</td></tr>"
        for arm in group.arms
        for run in arm.runs
    )
    return f"""<details><summary>Every run: {sum(len(arm.runs) for arm in group.arms)} folders
</summary><div class="scroll"><table class="runs"><thead><tr><th scope="col">Folder</th>
<th scope="col">Arm</th><th scope="col">Seed</th><th scope="col">Steps</th>
<th scope="col">Error, %</th><th scope="col">Seconds</th></tr></thead>
<tbody>{rows}</tbody></table></div></details>"""


def _relative(path: Path, root: Path) -> Path:
    return path.relative_to(root) if path != root else Path(path.name)


_METHOD = """
<dl>
<dt>Time saved</dt><dd>of the full-length ordinary run, which has as many steps as the FreezeOut run
was asked for, or else is the longest. The cost of a step is the median in each epoch, divided by
the median step of the ordinary run of the same seed and hardware; over seeds the median is taken
again. One slow run, or one slow hour, does not decide. For ordinary runs it is their
number of steps. Training seconds are the median of the runs' own totals, and may be disturbed.</dd>
<dt>Ordinary run of its time</dt><dd>a run without freezing whose steps take as long as all of the
FreezeOut run's, within 3 %. Its learning rate is annealed to zero over its own, shorter
length.</dd>
<dt>sd, n</dt><dd>the sample standard deviation over seeds, and how many. A difference over fewer of
them has an n of its own.</dd>
<dt>95 % interval</dt><dd>Student's t, over the differences between runs of the same seed where two
or more seeds match, otherwise Welch's. It says how far seeds alone may move the difference; that
other images or another machine would give the same is not in it.</dd>
<dt>Pays, does not pay, undecided</dt><dd>whether that interval lies below zero, above it, or holds
it. Undecided is not “no difference”: with few seeds the interval is wide.</dd>
</dl>"""

_CSS = f"""
:root {{ color-scheme: light dark; {css_variables(dark=False)} --ground: #f4f5f7;
 --good: #00694d; --bad: #a83a00; }}
@media (prefers-color-scheme: dark) {{ :root {{ {css_variables(dark=True)} --ground: #0d0f12;
 --good: #3fcfa2; --bad: #ff9447; }} }}
@media print {{ :root {{ color-scheme: light; {css_variables(dark=False)} --ground: #fff;
 --good: #00694d; --bad: #a83a00; }} }}
* {{ box-sizing: border-box; }}
body {{ margin: 0; background: var(--ground); color: var(--ink);
 font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }}
header, main {{ max-width: 1080px; margin: 0 auto; padding: 0 24px; }}
header {{ padding-top: 56px; padding-bottom: 8px; }}
.name {{ margin: 0; color: var(--muted); font-size: 14px; letter-spacing: .02em; }}
h1 {{ margin: 4px 0 12px; font-size: 38px; line-height: 1.15; letter-spacing: -.02em; }}
.lead {{ max-width: 42em; margin: 0; font-size: 18px; color: var(--muted); }}
section {{ margin: 40px 0; }}
h2 {{ margin: 0 0 2px; font-size: 24px; letter-spacing: -.01em; }}
h3 {{ margin: 0 0 8px; font-size: 15px; }}
.sub {{ margin: 0 0 20px; color: var(--muted); font-size: 14px; }}
.verdicts {{ list-style: none; margin: 0 0 20px; padding: 0; max-width: 52em; }}
.verdicts li {{ margin: 0 0 10px; padding-left: 118px; position: relative; }}
.tag {{ position: absolute; left: 0; top: 3px; width: 104px; text-align: center; font-size: 12px;
 font-weight: 600; line-height: 20px; border: 1px solid currentColor; border-radius: 11px;
 color: var(--muted); }}
.tag.better {{ color: var(--good); }} .tag.worse {{ color: var(--bad); }}
.scroll {{ overflow-x: auto; background: var(--paper); border: 1px solid var(--rule);
 border-radius: 8px; }}
table {{ border-collapse: collapse; width: 100%; font-size: 14px;
 font-variant-numeric: tabular-nums; }}
th, td {{ padding: 7px 12px; text-align: right; white-space: nowrap; }}
thead th {{ color: var(--muted); font-weight: 500; font-size: 12.5px; line-height: 1.3;
 vertical-align: bottom; padding-bottom: 4px; }}
thead tr:last-child th {{ padding-bottom: 8px; }}
th[colspan] {{ text-align: center; }}
tbody tr {{ border-top: 1px solid var(--rule); }}
tbody th, thead tr:first-child th:first-child {{ text-align: left; }}
tbody th {{ font-weight: 600; }}
tr.ordinary th {{ font-weight: 400; }}
.range, .over {{ color: var(--muted); }}
.over {{ font-size: .85em; }}
.note {{ margin: 10px 0 0; color: var(--muted); font-size: 14px; }}
.figures {{ display: grid; grid-template-columns: 1fr 1fr; gap: 20px; margin: 24px 0;
 grid-auto-flow: dense; }}
.wide {{ grid-column: 1 / -1; }}
figure {{ margin: 0; padding: 18px 18px 14px; background: var(--paper);
 border: 1px solid var(--rule); border-radius: 8px; break-inside: avoid; }}
figure svg {{ display: block; width: 100%; height: auto; }}
figcaption {{ margin-top: 8px; color: var(--muted); font-size: 13px; line-height: 1.45; }}
.of {{ display: block; max-width: 15em; white-space: normal; color: var(--muted);
 font-size: 12.5px; line-height: 1.3; }}
details {{ font-size: 14px; }} summary {{ cursor: pointer; color: var(--muted); }}
details .scroll {{ margin-top: 10px; }}
table.runs {{ font-size: 13px; }}
table.runs th {{ font-weight: 400; }} table.runs td:nth-child(2) {{ text-align: left; }}
table.runs th:nth-child(2) {{ text-align: left; }}
.warning li {{ overflow-wrap: anywhere; }}
dl {{ max-width: 52em; margin: 10px 0 0; font-size: 14px; }}
dt {{ font-weight: 600; margin-top: 10px; }} dd {{ margin: 0; color: var(--muted); }}
main {{ padding-bottom: 56px; }}
@media screen and (max-width: 800px) {{ .figures {{ grid-template-columns: 1fr; }}
 h1 {{ font-size: 30px; }}
 .verdicts li {{ padding-left: 0; }} .tag {{ position: static; display: inline-block; }} }}
@media print {{ body {{ font-size: 10pt; }} header {{ padding-top: 0; }} h1 {{ font-size: 22pt; }}
 header, main {{ max-width: none; padding-left: 0; padding-right: 0; }} details {{ display: none; }}
 section {{ margin: 16pt 0; }} table {{ font-size: 8pt; }} th, td {{ padding: 3pt 4pt; }}
 thead th, .of {{ font-size: 7pt; }}
 .sub, .note, .lead, figcaption, dl {{ font-size: 9pt; }} dt {{ break-after: avoid; }}
 .scroll {{ overflow: visible; break-inside: avoid; }}
 figure {{ padding: 8pt; }} .figures {{ gap: 10pt; }} h2, h3 {{ break-after: avoid; }} }}
"""
