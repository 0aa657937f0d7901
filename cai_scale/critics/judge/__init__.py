"""A language model as a critic: asked over any OpenAI-compatible endpoint, or in this process."""

from pathlib import Path

from cai_scale import endpoint
from cai_scale.commands import require
from cai_scale.constitution import Constitution
from cai_scale.critics.judge.critic import Judge, Model
from cai_scale.critics.judge.journal import Journal
from cai_scale.critics.judge.settings import Settings
from cai_scale.errors import ConfigError

__all__ = ["Judge", "Settings", "check", "load", "model_of"]


def load(
    constitution: Constitution,
    settings: Settings,
    *,
    journal: Path | None = None,
    name: str = "judge",
    shown: bool = True,
) -> Judge:
    """The judge that the settings describe; a local model is loaded at its first question.

    Args:
        journal: the file of its verdicts; they are kept in memory where None.
        shown: whether to show a progress bar.

    Raises:
        CaiError: the settings, the address or the journal cannot be used.
    """
    kept = Journal(journal)
    return Judge(constitution, settings, model_of(settings), kept, name=name, shown=shown)


def check(settings: Settings) -> None:
    """Complain about a judge that cannot be asked, before anything is loaded.

    Raises:
        CaiError: the settings or the address cannot be used, or the server does not answer.
    """
    model = model_of(settings)
    if settings.url is not None:
        names = endpoint.models_of(settings.url, "--judge_url")
        # Some servers have models that they do not list, such as folders.
        listed = model.name in names
        if not listed and not endpoint.answers(settings.url, model.name, settings.deadline):
            endpoint.check_model(settings.url, names, model.name, "--judge_model")
    else:
        from cai_scale.training import models

        models.check(model.name)


def model_of(settings: Settings) -> Model:
    """What will be asked; where the settings do not name it, the server is asked for its name."""
    if settings.url is not None:
        require("--critic judge", "judge", "openai", "rich")
        from cai_scale.critics.judge.remote import RemoteModel

        name = settings.model or _only_model(settings.url)
        return RemoteModel(
            settings.url,
            name,
            concurrency=settings.concurrency,
            deadline=settings.deadline,
            tokens=settings.reply_tokens,
        )
    if settings.model is None:
        raise ConfigError(
            "--critic judge: which one? give --judge_url and --judge_model, of a server, or "
            "--judge_model alone for a model in this process"
        )
    require("a judge without --judge_url", "train", "torch", "transformers", "rich")
    from cai_scale.critics.judge.local import LocalModel

    return LocalModel(settings.model, rows=settings.concurrency, tokens=settings.reply_tokens)


def _only_model(url: str) -> str:
    names = endpoint.models_of(url, "--judge_url")
    if len(names) != 1:
        shown = ", ".join(names[:5]) or "none"
        raise ConfigError(f"server {url} has the models {shown}; name one with --judge_model")
    return names[0]
