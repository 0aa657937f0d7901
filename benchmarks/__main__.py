"""`make bench`: run every part in turn, in a process of its own, and write BENCHMARKS.md."""

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from cai_scale.runs import versions

PARTS = ("lexicon", "install", "decode", "scorer", "rollout", "training", "judge")
LIBRARIES = (
    *("cai-scale", "onnxruntime", "onnxruntime-genai", "torch", "transformers", "trl", "peft"),
    "numpy",
)
HERE = Path(__file__).parent
RESULTS = HERE / "results.json"


def main() -> None:
    """Measure the parts named on the command line, all without; keep the others' figures."""
    results = json.loads(RESULTS.read_text("utf-8")) if RESULTS.is_file() else {}
    for part in sys.argv[1:] or PARTS:
        print(f"{part} …", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "result.json"
            subprocess.run([sys.executable, HERE / f"{part}.py", "--json", path], check=True)
            figures = json.loads(path.read_text("utf-8"))
        results[part] = {"machine": machine(), "figures": figures}
        RESULTS.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    (HERE.parent / "BENCHMARKS.md").write_text(report(results), "utf-8")


def machine() -> dict[str, Any]:
    cpu = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "date": time.strftime("%Y-%m-%d"),
        "cpu": f"{cpu}, {os.cpu_count()} cores, {memory:.0f} GiB",
        "versions": {"python": platform.python_version(), **versions(*LIBRARIES)},
    }


def report(results: dict[str, Any]) -> str:
    notes = (HERE / "notes.md").read_text("utf-8")
    parts = [notes]
    for part in PARTS:
        if part in results:
            found = results[part]
            known = ", ".join(f"{k} {v}" for k, v in found["machine"]["versions"].items())
            parts.append(
                f"## {TITLES[part]}\n\n{found['machine']['date']}; {found['machine']['cpu']}; "
                f"{known}.\n\n{TABLES[part](found['figures'])}"
            )
    return "\n\n".join(part.strip() for part in parts) + "\n"


def table(head: list[str], rows: list[list[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def lexicon(figures: dict[str, Any]) -> str:
    rows = [[name, *(f"{rate:.1f}" for rate in rates.values())] for name, rates in figures.items()]
    return table(["text", "MB a second at 1 MB", "at 10 MB"], rows) + (
        "\n\nTarget: 20 MB a second on one core, time linear in length."
    )


def install(figures: dict[str, Any]) -> str:
    base, ready = figures["base install, MB"], figures["8 bits ready"]
    disk = figures["8 bits on disk, MB"]
    rows = [
        ["what the project adds to its libraries", f"{base['cai-scale']:.2f} MB", "under 2 MB"],
        ["with its libraries", f"{base['with its libraries']:.0f} MB", "about 200 MB"],
        [
            "import of the runtime",
            f"{figures['import, seconds']['cai_scale.runtime']['median']:.2f} s",
            "≤ 0.3 s",
        ],
        ["8-bit model ready, every hash checked", f"{ready['seconds']:.2f} s", "≤ 2 s"],
        [
            f"its memory when it is ready, against {disk:.0f} MB on disk",
            f"{(ready['loaded'] - ready['before']) / disk:.2f} ×",
            "≤ 1.5 ×",
        ],
        ["after an answer", f"{(ready['answering'] - ready['before']) / disk:.2f} ×", ""],
        ["its peak while loading", f"{(ready['peak'] - ready['before']) / disk:.2f} ×", ""],
    ]
    return table(["", "median of 5", "target"], rows)


def decode(figures: dict[str, Any]) -> str:
    base = figures["llama.cpp Q4_1"]["median"]
    targets = {"onnx q4": "≥ 1.3", "onnx q8": "≥ 0.8"}
    rows = [
        [name, f"{found['median']:.0f}", f"{found['median'] / base:.2f}", targets.get(name, "")]
        for name, found in figures.items()
        if name != "tokens"
    ]
    return table(["batch 1", "tokens a second", "÷ llama.cpp", "target"], rows)


def scorer(figures: dict[str, Any]) -> str:
    rows = [
        [
            name,
            figures["batch_tokens"][name],
            f"{figures['texts'] / taken['median']:.1f}",
            f"{figures['ratio'][name]:.2f}",
            "≥ 2" if name == "onnx q8" else "",
        ]
        for name, taken in figures["seconds"].items()
    ]
    head = ["", "tokens a batch", "texts a second", "÷ torch fp32", "target"]
    return (
        f"{table(head, rows)}\n\n{figures['texts']} texts, {figures['tokens']} tokens, quartiles "
        f"{', '.join(f'{length:.0f}' for length in figures['lengths'])}. 8 bits against torch in "
        f"fp32: Spearman {figures['spearman']:.4f} (target 0.995), pairs in the same order "
        f"{figures['order']:.4f}, max |Δ score| {figures['max_abs_delta']:.3f}."
    )


def rollout(figures: dict[str, Any]) -> str:
    texts = []
    targets = {
        "one length": {"onnx fp32": "≥ 2.5 × fp32", "fastest": "≥ 3.5"},
        "own lengths": {"onnx fp32": "≥ 3.25 × fp32", "fastest": "≥ 4.55"},
    }
    for mode, wanted in targets.items():
        found = figures[mode]
        torch = {name: f["median"] for name, f in found.items() if name.startswith("trans")}
        rows = [
            [
                name,
                figure["batch"],
                f"{figure['median']:.0f}",
                f"{figure['median'] / torch['transformers fp32']:.2f}",
                f"{figure['median'] / max(torch.values()):.2f}",
                wanted.get(name, ""),
            ]
            for name, figure in found.items()
        ]
        limit = figures["length" if mode == "one length" else "cap"]
        head = ["", "batch", "tokens a second", "÷ transformers fp32", "÷ its best", "target"]
        histogram = found["onnx fp32"]["lengths"]
        texts.append(
            f"### {mode.capitalize()}, {'' if mode == 'one length' else 'at most '}{limit} tokens\n"
            f"\n{table(head, rows)}\n\nTarget of the fastest variant that passes its gate: "
            f"{wanted['fastest']} × the best of transformers. Lengths of the fp32 answers, by "
            f"steps of 32: " + ", ".join(f"{k}–: {v}" for k, v in histogram.items()) + "."
        )
    return "\n\n".join(texts)


def training(figures: dict[str, Any]) -> str:
    targets = {("dpo", "fp32"): "≥ 2", ("dpo", "bf16"): "≥ 3"}
    rows = []
    for method in ("dpo", "rlaif"):
        for precision, found in figures[method].items():
            medians = {name: rates["median"] for name, rates in found["rates"].items()}
            for name, rate in medians.items():
                own, dpo = name == "ours", method == "dpo"
                share = rate * figures["operations"] / figures["peak"][precision]
                memory = found.get("memory")
                rows.append(
                    [
                        f"{method} {precision}",
                        "this project" if own else "TRL" if dpo else "transformers.Trainer",
                        f"{rate:.0f}",
                        f"{rate / medians['stock']:.2f}",
                        targets.get((method, precision), "≥ 1.5") if own else "",
                        f"{share:.0%}" if dpo else "",
                        f"{memory[name] / 2**30:.2f}" if memory else "not measured",
                        f"{memory[name] / memory['stock']:.2f}" if memory else "",
                        "≤ 0.6" if own and dpo else "",
                    ]
                )
    head = ["", "trainer", "real tokens a second", "÷ stock", "target", "of peak"]
    peaks = " and ".join(f"{name} {rate / 1e9:.0f}" for name, rate in figures["peak"].items())
    tried = "; ".join(
        f"dpo {precision}: "
        + ", ".join(
            f"{one['rows']} pairs at once{', checkpointing' * one.get('checkpointing', False)}, "
            f"{one['weights']} {one['rate']:.0f}"
            for one in found["tried"]
        )
        for precision, found in figures["dpo"].items()
    )
    same = [
        [name, f"{one['log-probabilities']:.1e}", f"{one['margins']:.1e}", f"{one['margin']:.3f}"]
        for name, one in figures.get("same", {}).items()
    ]
    return (
        f"{table([*head, 'GiB over the model', '÷ stock', 'target'], rows)}\n\nMedians of 5 turns "
        f"of two steps, 8 pairs each (rlaif: 16 answers); the stock trainers as they were "
        f"quickest, memory with a whole step at once. Peak of matrix products, 10⁹ "
        f"a second: {peaks}; a real token of dpo needs {figures['operations'] / 1e9:.2f} · 10⁹ "
        f"operations. Stock's settings that were tried, tokens a second: {tried}."
        + (
            "\n\nAfter 50 steps of 2 pairs, against stock in fp32 (targets: fp32 1e-3; bf16 no "
            "further than stock's):\n\n"
            + table(
                ["", "log-probabilities, max |Δ| / |log p|", "margins, max |Δ|", "mean margin"],
                same,
            )
            if same
            else ""
        )
    )


def judge(figures: dict[str, Any]) -> str:
    rows = [
        [name, f"{found['median']:.0f}", target]
        for (name, found), target in zip(
            figures["rates"].items(), (f"≥ {0.9 * figures['ideal']:.0f}", ""), strict=True
        )
    ]
    held = {int(count): size / 2**20 for count, size in figures["memory"].items()}
    shown = ", ".join(f"{held[n]:.0f} after {n:,}" for n in (1000, 5000, 25_000, 50_000))
    return (
        f"{table(['an answer takes', 'calls a second, median of 5', 'target'], rows)}\n\n64 calls "
        f"at once, the labeller on one core, every verdict in the journal. MiB held, comparisons "
        f"of two calls each: {shown}."
    )


TITLES = {
    "lexicon": "The lexicon critic",
    "install": "The base install",
    "decode": "Decoding one answer",
    "scorer": "The reward scorer",
    "rollout": "Rollouts",
    "training": "Training",
    "judge": "A judge over an endpoint",
}
TABLES = {
    "lexicon": lexicon, "install": install, "decode": decode, "scorer": scorer, "rollout": rollout,
    "training": training, "judge": judge,
}  # fmt: skip

if __name__ == "__main__":
    main()
