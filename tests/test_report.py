"""The report: page, Markdown, data and picture of a run that was written by hand."""

import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from cai_scale import constitution as constitutions
from cai_scale.cli import main
from cai_scale.evaluation import charts, report, table
from cai_scale.evaluation.report import _samples, gained
from cai_scale.records import read_json, write_json
from cai_scale.report import stored
from cai_scale.runs import Run
from reported import REASONS, SCRIPT, without_new, write_run

LOADS = ("src", "srcset", "data", "action", "poster", "background", "formaction")


class Page(HTMLParser):
    """What a page would load, its elements, and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.marks: list[tuple[str, str]] = []
        self.text, self.style = "", ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        given = dict(attrs)
        self.loads += [str(given[name]) for name in LOADS if name in given]
        self.loads += [
            str(value)
            for name, value in attrs
            if name.endswith("href") and not str(value).startswith("#")
        ]
        self.style += f" {given.get('style')}"
        if "id" in given:
            self.ids.append(str(given["id"]))
        if tag == "mark":
            self.marks.append((str(given["class"]), str(given.get("title", ""))))

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1] == "style":
            self.style += data
        else:
            self.text += data

    @property
    def outside(self) -> list[str]:
        """What is loaded from elsewhere, by an attribute or by a style."""
        urls = re.findall(r"url\(([^)]*)\)", self.style)
        return (
            self.loads
            + [url for url in urls if not url.startswith("#")]
            + re.findall("@import", self.style)
        )


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, dict[str, Any]]:
    return write_run(tmp_path_factory.mktemp("runs") / "by hand")


@pytest.fixture(scope="module")
def html(written: tuple[Run, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> str:
    return rendered(written[0], tmp_path_factory.mktemp("page") / "page.html")


def rendered(run: Run, output: Path) -> str:
    assert main(["report", "--run", str(run.path), "--output", str(output)]) == 0
    return output.read_text("utf-8")


def copy(run: Run, path: Path, summary: dict[str, Any]) -> Run:
    other = Run(Path(shutil.copytree(run.path, path)))
    write_json(other.summary, summary)
    return other


def minus(text: str) -> str:
    return text.replace("-", "−")


def test_the_page_loads_nothing(html: str) -> None:
    page = Page(html)
    assert page.outside == []
    assert not {"script", "link", "iframe", "img", "object"} & set(page.tags)
    assert "http" not in html
    assert page.tags.count("svg") == 9
    assert len(set(page.ids)) == len(page.ids)
    # The control: each of these is found.
    for loaded in (
        '<img src="a.png">', "<style>a { background: url(b) }</style>", '<link href="c.css">',
        '<style>@import "d"</style>', '<p style="background: url(e)">', '<image xlink:href="f">',
    ):  # fmt: skip
        assert len(Page(loaded).outside) == 1


def test_what_others_wrote_stays_text(html: str) -> None:
    page = Page(html)
    assert page.text.count(SCRIPT) >= 3  # a prompt, an answer, a reason
    assert "tiny <model>" in page.text
    assert "49" not in re.findall(r"\$x_\$ (\S+)", page.text)
    assert "A plain\ufffd answer\ufffd[1m." in page.text and not {"\x00", "\x1b"} & set(html)


def test_a_title_in_a_chart_stays_text() -> None:
    drawn = charts.svg("one", charts.estimates([(SCRIPT[:20], 0.1, None), ("$x_$", 0.1, None)]), 2)
    assert "<script" not in drawn and "&lt;script" in drawn and "$x_$" in drawn


def test_the_figures_are_those_of_the_summary(
    html: str, written: tuple[Run, dict[str, Any]]
) -> None:
    text, (_, summary) = Page(html).text, written
    delta = summary["delta"]
    for given in (
        delta,
        *(
            summary["slices"][kind][name]["delta"]
            for kind, name in (("language", "en"), ("category", "unsafe"))
        ),
    ):
        assert minus(f"{given['overall']:+.4f}") in text
        assert minus("[{:+.4f}, {:+.4f}]".format(*given["ci95"])) in text
    for part in (
        summary["length_matched"],
        summary["supported"],
        *(summary["halves"][h] for h in ("seen", "unseen")),
    ):
        assert minus(f"{part['delta']:+.4f}") in text
    for principle in constitutions.load().principles:
        value = [
            s["principles"][principle.id] for s in (summary["before"], summary["after"], delta)
        ]
        assert (
            f"{principle.title['en']}{value[0]:.4f}{value[1]:.4f}{minus(f'{value[2]:+.4f}')}"
            in text
        )
    assert f"{summary['win']} : {summary['loss']}" in text
    for word in summary["words"]:
        moved = minus(f"{word['moved']:+.4f}")
        assert f"{word['before']}{word['after']}{moved}" in text
    assert f"(Spearman {summary['lengths']['spearman']:+.2f})" in text
    assert "The gain is weak" in text and all(reason in text for reason in REASONS)


def test_provenance(html: str, written: tuple[Run, dict[str, Any]]) -> None:
    text = Page(html).text
    for fact in (
        written[1]["constitution"], "a" * 64, "b" * 64, "9.9.9", "1,200 s", "1,234 s", "123,456",
        "7,890", "3.21 GB", "0.512", "1,000,000 and 250,000",
    ):  # fmt: skip
        assert fact in text
    assert re.search(r"judge's cost\s*4\s", text)  # 2 × 1 + 8 × 0.25
    assert re.search(r"seed of the training\s*41\s", text)


def test_the_kept_step_is_the_best_of_all_rounds(html: str) -> None:
    """Steps go on from round to round: 5, 10, then 15 and 20."""
    assert "score on the guard's prompts; kept: step 15" in Page(html).text


def test_samples_are_the_best_the_worst_and_some_by_lot(
    written: tuple[Run, dict[str, Any]],
) -> None:
    run, summary = written
    answered = stored(run, summary, constitutions.load())
    groups = dict(_samples(answered))
    assert {title: len(group) for title, group in groups.items()} == {
        "Most gained": 4, "Most lost": 3, "Drawn at random": 3,
    }  # fmt: skip
    deltas = sorted(gained(a) for a in answered if a.before_score and a.after_score)
    assert [gained(a) for a in groups["Most gained"]] == deltas[:-5:-1]
    assert [gained(a) for a in groups["Most lost"]] == deltas[:3]
    assert len({a.prompt.id for group in groups.values() for a in group}) == 10
    assert _samples(answered) == _samples(answered)
    assert _samples([]) == []


def test_words_are_marked_by_their_sign(html: str) -> None:
    marks = Page(html).marks
    assert ("down", "Harmless -0.15") in marks  # kill
    assert ("up", "Respectful +0.08") in marks  # please


def test_another_critic_s_answers_have_no_marks(
    written: tuple[Run, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, summary = written
    other = copy(run, tmp_path / "run", {**summary, "critic": "judge"})
    page = ["report", "--run", str(other.path), "--output", str(tmp_path / "page.html")]
    assert main(page) == 1  # the scores that it gave are not there
    assert "is not stored" in capsys.readouterr().err
    answered = stored(run, summary, constitutions.load())
    text = report.page(other, read_json(other.summary), answered, constitutions.load())
    assert len(Page(text).marks) == 2  # those of the legend


def test_an_older_summary_has_a_page_too(
    written: tuple[Run, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, summary = written
    old = copy(run, tmp_path / "old", without_new(summary))
    for path in (old.config, old.metrics, old.round(1).metrics, old.round(2).audit, old.labels()):
        path.unlink()
    page = Page(rendered(old, tmp_path / "old.html"))
    assert page.outside == []
    assert "no verdict" in page.text and "language: vi" in page.text.replace("\xa0", " ")
    assert "Training" not in page.text and "The pairs" not in page.text
    for form in ("html", "md"):
        assert main(["report", "--run", str(old.path), "--format", form]) == 0
        assert f"{summary['delta']['overall']:+.4f}" in capsys.readouterr().out


def test_a_reward_model_has_a_page(
    written: tuple[Run, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = {
        "pairs": 12,
        "accuracy": 0.8125,
        "spearman": None,
        "pearson": 0.5,
        "ece": 0.1,
        "bins": [],
    }
    reward = {"n": 9, "objective": "regression", "margin": 0.05, "labels": {"harmless": figures}}
    kept = {key: written[1][key] for key in ("schema", "model", "constitution", "seconds")}
    run = copy(written[0], tmp_path / "run", {**kept, "method": "reward", "reward": reward})
    text = Page(rendered(run, tmp_path / "page.html")).text
    assert "A reward model" in text and "Harmless120.8125–0.50000.1000" in text
    for form in ("html", "md"):
        assert main(["report", "--run", str(run.path), "--format", form]) == 0
        assert "0.8125" in capsys.readouterr().out


def test_markdown(written: tuple[Run, dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    run, summary = written
    assert main(["report", "--run", str(run.path), "--format", "md"]) == 0
    text = capsys.readouterr().out
    assert "**The gain is weak**" in text
    assert f"| **Overall** | **{summary['before']['overall']:.4f}** |" in text
    assert "<script>" not in text.replace("\\<script\\>", "") and "tiny \\<model\\>" in text
    widths = [len(re.findall(r"(?<!\\)\|", line)) for line in text.splitlines() if line[:1] == "|"]
    assert set(widths) == {7, 6}


def test_json_is_the_summary(
    written: tuple[Run, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, _ = written
    assert main(["report", "--run", str(run.path), "--format", "json"]) == 0
    assert capsys.readouterr().out == run.summary.read_text("utf-8")
    output = tmp_path / "one.json"
    assert (
        main(["report", "--run", str(run.path), "--format", "json", "--output", str(output)]) == 0
    )
    assert output.read_text("utf-8") == run.summary.read_text("utf-8")
    assert capsys.readouterr().out == ""


def test_a_picture(written: tuple[Run, dict[str, Any]], tmp_path: Path) -> None:
    output = tmp_path / "one.png"
    assert (
        main(["report", "--run", str(written[0].path), "--format", "png", "--output", str(output)])
        == 0
    )
    assert output.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_the_run_s_own_files_are_not_overwritten(
    written: tuple[Run, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    run, _ = written
    for output in (run.report, run.summary, run.path):
        assert main(["report", "--run", str(run.path), "--output", str(output)]) == 2
        assert "name a" in capsys.readouterr().err


def test_the_same_figures_give_the_same_page(
    html: str, written: tuple[Run, dict[str, Any]], tmp_path: Path
) -> None:
    assert rendered(written[0], tmp_path / "again.html") == html


def test_a_report_leaves_the_run_as_it_was(
    written: tuple[Run, dict[str, Any]], tmp_path: Path
) -> None:
    run, _ = written
    files = {file: file.read_bytes() for file in run.path.rglob("*") if file.is_file()}
    rendered(run, tmp_path / "page.html")
    assert {f: f.read_bytes() for f in run.path.rglob("*") if f.is_file()} == files


def test_colours_follow_the_page(html: str) -> None:
    """No colour of a chart is its own, so that dark and print change them all."""
    drawn = "".join(re.findall(r"<svg.*?</svg>", html, re.DOTALL))
    assert "var(--after)" in drawn
    assert set(re.findall(r"#[0-9a-f]{6}\b", drawn)) <= {"#000000"}


@pytest.mark.parametrize(
    ("key", "before", "after", "worse"),
    [
        ("rep_4", 0.1, 0.2, True), ("rep_4", 0.2, 0.1, False), ("relevance", 0.5, 0.4, True),
        ("relevance", 0.4, 0.5, False), ("words", 50.0, 90.0, False),
        ("perplexity", 3.0, 4.0, True), ("rep_4", 0.1, 0.1004, False),
    ],
)  # fmt: skip
def test_worse_is_marked(key: str, before: float, after: float, worse: bool) -> None:
    [row] = table.drift_rows({"drift": {"before": {key: before}, "after": {key: after}}})
    assert row.worse is worse


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("chromium and chromedriver are not on PATH")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    profile = f"--user-data-dir={tmp_path_factory.mktemp('profile')}"
    for flag in ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", profile):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield browser
    browser.quit()


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1200])
def test_the_page_fits_its_window(
    browser: Any, html: str, tmp_path: Path, width: int, scheme: str
) -> None:
    (tmp_path / "page.html").write_text(html, "utf-8")
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    media = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": media})
    browser.get((tmp_path / "page.html").as_uri())
    root = "document.documentElement"
    assert browser.execute_script(f"return {root}.scrollWidth") <= width
    assert browser.title == "by hand: before and after"
    colour = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (colour == "rgb(248, 247, 244)") == (scheme == "light")
    text = browser.execute_script(
        "return getComputedStyle(document.querySelector('svg text')).fill"
    )
    assert text != colour
    assert len(browser.get_screenshot_as_png()) > 10_000
    assert browser.get_log("browser") == []
    # The control: what is too wide would be seen.
    browser.execute_script(
        "document.querySelector('table').parentElement.style.overflow = 'visible';"
        "document.querySelector('table').style.width = '2000px'"
    )
    assert browser.execute_script(f"return {root}.scrollWidth") > width
