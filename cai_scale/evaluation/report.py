"""The report: one HTML file with the figures, charts, and answers side by side."""

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from cai_scale.constitution import Constitution
from cai_scale.evaluation.compare import Answered
from cai_scale.evaluation.table import rows
from cai_scale.records import read_json, read_jsonl, replacing
from cai_scale.runs import Run

SAMPLES = 24
CURVES = {  # what the methods log, and what to call it
    "loss": "loss",
    "rewards/margins": "reward margin",
    "lm_loss": "loss of the language model",
    "reward_loss": "loss of the reward head",
    "reward": "mean reward",
}


def write_report(
    run: Run, summary: Mapping[str, Any], answered: Sequence[Answered], constitution: Constitution
) -> None:
    """Write `run.report`, which refers to nothing outside itself."""
    environment = Environment(
        loader=PackageLoader("cai_scale.evaluation", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("report.html.jinja").render(
        run=run.path.name,
        summary=summary,
        config=read_json(run.config) if run.config.is_file() else {},
        audit=read_json(audit) if (audit := run.round(run.rounds).audit).is_file() else {},
        constitution=constitution,
        table=rows(summary, constitution),
        slices={
            name: (part["n"], rows(part, constitution))
            for kind in ("language", "category")
            for name, part in summary["slices"][kind].items()
        },
        charts=_charts(run, summary, answered, constitution),
        samples=_spread(answered, SAMPLES),
    )
    with replacing(run.report) as file:
        file.write(page)


def _spread(answered: Sequence[Answered], count: int) -> list[Answered]:
    """Every few prompts one, so that no answer is picked for its looks."""
    step = max(1, len(answered) // count)
    return list(answered[::step][:count])


def _charts(
    run: Run, summary: Mapping[str, Any], answered: Sequence[Answered], constitution: Constitution
) -> dict[str, str]:
    import matplotlib

    matplotlib.use("Agg")
    charts = {
        "Scores before and after": _scores(summary, constitution),
        "Difference per prompt": _differences(answered),
    }
    return charts | ({"Training": _training(run)} if run.metrics.is_file() else {})


def _scores(summary: Mapping[str, Any], constitution: Constitution) -> str:
    figure, axes = _figure()
    names = [*(p.id for p in constitution.principles), "overall"]
    for offset, when in ((-0.2, "before"), (0.2, "after")):
        scores = {**summary[when]["principles"], "overall": summary[when]["overall"]}
        places = [i + offset for i in range(len(names))]
        axes.bar(places, [scores[name] or 0 for name in names], 0.38, label=when)
    axes.set_xticks(range(len(names)), names)
    axes.set_ylim(0, 1)
    axes.set_ylabel("mean score")
    axes.legend()
    return _image(figure)


def _differences(answered: Sequence[Answered]) -> str:
    figure, axes = _figure()
    deltas = sorted(
        a.after_score.overall - a.before_score.overall
        for a in answered
        if a.after_score is not None and a.before_score is not None
    )
    colours = ["tab:green" if d > 0 else "tab:red" if d < 0 else "tab:grey" for d in deltas]
    axes.bar(range(len(deltas)), deltas, color=colours, width=1.0)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xlabel("held-out prompts, sorted")
    axes.set_ylabel("Δ overall")
    return _image(figure)


def _training(run: Run) -> str:
    figure, axes = _figure()
    logs = [record for _, record in read_jsonl(run.metrics, torn_tail=True)]
    for key, label in CURVES.items():
        points = [(log["step"], log[key]) for log in logs if key in log]
        if points:
            axes.plot(*zip(*points, strict=True), label=label)
    axes.set_xlabel("step")
    axes.legend()
    return _image(figure)


def _figure() -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.2), layout="constrained")
    return figure, figure.subplots()


def _image(figure: Any) -> str:
    """A figure as a data URI."""
    content = io.BytesIO()
    figure.savefig(content, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(content.getvalue()).decode("ascii")
