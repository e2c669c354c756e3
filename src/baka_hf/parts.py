"""Parts of others that lie in a checkpoint, made known to this package.

    import_parts("ada/baka-gru")
    model = BakaForCausalLM.from_pretrained("ada/baka-gru")

Where the package is not imported, `trust_remote_code=True` does that by itself.
"""

import os
from importlib import import_module
from pathlib import Path
from typing import Any

from transformers.dynamic_module_utils import HF_MODULES_CACHE, get_cached_module_file

from . import __path__ as places
from .configuration_baka import BakaConfig


def import_parts(checkpoint: str | os.PathLike, **options: Any) -> None:
    """Run the code of the parts that a checkpoint brings, which registers them. Only do so if you trust it.

    Args:
        checkpoint: a folder, or a name on the Hub.
        options: of the Hub: `revision`, `token`, `cache_dir`, `force_download`, `local_files_only`.

    Raises:
        ValueError: another part goes by the name of one of them, or other code by that of its file.
        OSError: there is no such checkpoint, or its parts came in no file: they stood in a script.
    """
    fields, _ = BakaConfig.get_config_dict(checkpoint, **options)
    for code in (fields.get("parts") or {}).values():
        file = code.partition(".")[0]
        copy = Path(HF_MODULES_CACHE, get_cached_module_file(str(checkpoint), f"{file}.py", **options))
        # As modules of this package: what they import from their neighbours is then what is here.
        places.append(str(copy.parent))
        try:
            module = import_module(f"{__package__}.{file}")
        finally:
            places.remove(str(copy.parent))
        if Path(str(module.__file__)).read_bytes() != copy.read_bytes():
            raise ValueError(f"expected {file}.py of {checkpoint} to be that of {module.__file__}, imported before.")


__all__ = ["import_parts"]
