"""Autoencoders of diffusers, from a local folder or the hub, complete or not at all."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dit_dp.errors import UsageError

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def load_autoencoder(
    class_name: str, source: str | Path, subfolder: str | None, renames: Mapping[str, str] | None = None
) -> tuple[nn.Module, dict[str, Any]]:
    """Return one of diffusers' autoencoders with every weight from a checkpoint, float32, and its configuration.

    Args:
        class_name: In diffusers.
        source: A folder with ``config.json`` or ``vae/config.json``, from which alone is read; or a hub name.
        subfolder: Of the checkpoint in the source.
        renames: Parts of weights' names that a library has changed; both are taken for the model's.

    Raises:
        UsageError: Nothing there, another model, weights missing or over, or diffusers cannot be imported.
    """
    found, options = _locate(str(source), subfolder)
    cls = _renaming(_class_of(class_name), renames or {})
    try:
        config = cls.load_config(found, **options)
        if config.get("_class_name") != class_name:
            raise UsageError(f"frontend: {str(source)!r} holds a {config.get('_class_name')}; accepted: a {class_name}")
        # Otherwise diffusers would warn that it wants accelerate, which it needs for models that are split.
        options |= {"low_cpu_mem_usage": False, "torch_dtype": torch.float32}
        model, report = cls.from_pretrained(found, output_loading_info=True, **options)
    except UsageError:
        raise
    except (OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
        raise _error(source, error) from error
    # diffusers only logs a weight that is missing, and leaves it random.
    problems = [f"{kind.replace('_', ' ')} {names[:3]}" for kind, names in report.items() if names]
    if problems:
        raise UsageError(f"frontend: {str(source)!r} does not fit a {class_name}: {'; '.join(problems)}")
    return model, dict(model.config)


def _locate(source: str, subfolder: str | None) -> tuple[str, dict[str, Any]]:
    """Return what diffusers is to load and with which options: a folder if there is one, else a hub name."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        for place in ("", "vae") if subfolder is None else (subfolder,):
            if (folder / place / "config.json").is_file():
                return str(folder / place), {"local_files_only": True}
        wanted = "config.json or vae/config.json" if subfolder is None else f"{subfolder}/config.json"
        raise UsageError.for_value("frontend", source, f"a folder with {wanted}")
    if not _HUB_NAME.fullmatch(source) or source.startswith("."):
        raise UsageError.for_value("frontend", source, "an existing folder, or a hub name (owner/name)")
    return source, {} if subfolder is None else {"subfolder": subfolder}


def _class_of(class_name: str) -> Any:
    """Return a class of diffusers; only front-ends need it."""
    try:
        import diffusers
    except ImportError as error:
        cause = " ".join(str(error).split())
        raise UsageError(f"frontend: diffusers cannot be imported ({cause}); pip install diffusers") from error
    return getattr(diffusers, class_name)


def _renaming(cls: Any, renames: Mapping[str, str]) -> Any:
    """Return a model class that takes its weights under former and later names, too."""

    def rename(self: nn.Module, state_dict: dict[str, Tensor]) -> None:
        super(renaming, self)._fix_state_dict_keys_on_load(state_dict)
        known = set(self.state_dict())
        for name in [name for name in state_dict if name not in known]:
            for pair in renames.items():
                for there, here in (pair, pair[::-1]):
                    if name.replace(there, here) in known:
                        state_dict[name.replace(there, here)] = state_dict.pop(name)
                        break

    # What diffusers calls with the weights that it read, before it compares their names with the model's.
    renaming: Any = type(cls.__name__, (cls,), {"_fix_state_dict_keys_on_load": rename})
    return renaming


def _error(source: str | Path, error: BaseException) -> UsageError:
    """Return the one-line error for a failed load, with the cause at the bottom of the chain."""
    root = error
    while root.__cause__ or root.__context__:
        root = root.__cause__ or root.__context__ or root
    causes = dict.fromkeys(" ".join(str(e).split()) for e in (error, root))
    return UsageError(
        f"frontend: cannot load {str(source)!r}: {'; '.join(causes)}; accepted: an existing folder, or a hub name "
        "that can be reached"
    )
