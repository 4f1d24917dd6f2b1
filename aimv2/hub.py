"""Models of the Hugging Face hub by name."""

import difflib
from pathlib import Path

from aimv2.weights import ModelError

_RELEASED = [f"{size}-patch14-{pixels}" for size in ("large", "huge", "1B", "3B") for pixels in (224, 336, 448)]
_RELEASED += [f"large-patch14-{kind}" for kind in ("224-distilled", "336-distilled", "native", "224-lit")]
_TIMM = [f"{size}_patch14_{pixels}.apple_pt" for size in ("large", "huge", "1b", "3b") for pixels in (224, 336, 448)]
_TIMM += [f"large_patch14_{pixels}.apple_pt_dist" for pixels in (224, 336)]
HUB = {  # name -> repository, and the file where it holds several models
    **{f"aimv2-{name}": (f"apple/aimv2-{name}", None) for name in _RELEASED},
    **{f"aimv2_{name}": (f"timm/aimv2_{name}", None) for name in _TIMM},
    **{
        f"aim-{name}-imgs": ("apple/AIM", f"aim_{name.lower().replace('-', '_')}imgs_attnprobe_backbone.pth")
        for name in ("600M-2B", "1B-5B", "3B-5B", "7B-5B")
    },
}
_DOWNLOADED = ["*.json", "*.safetensors"]


def download(name: str, revision: str | None = None) -> Path:
    """The folder or file of a hub name in the local cache, downloaded if need be; offline, only from the cache.

    Raises ModelError for a name that is neither a file here nor one of the hub, with the nearest known ones.
    """
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    known = {key.lower(): value for key, value in HUB.items()}
    local = name.startswith((".", "/", "~")) or name.count("/") != 1 or Path(name).parent.exists()
    near = difflib.get_close_matches(name.rpartition("/")[2], HUB, n=3, cutoff=0.5)
    hint = f"; names of the hub like it: {', '.join(near)}" if near else ""
    if name.lower() not in known and local:
        raise ModelError(f"{name}: no such file or folder{hint}")
    repository, file = known.get(name.lower(), (name, None))
    try:
        if file is not None:
            return Path(hf_hub_download(repository, file, revision=revision))
        return Path(snapshot_download(repository, revision=revision, allow_patterns=_DOWNLOADED))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        at = f" at revision {revision}" if revision else ""
        raise ModelError(
            f"{name}: no such file or folder here, and {repository}{at} of the hub is neither cached nor to be had "
            f"({type(error).__name__}: {reason}){hint}"
        ) from error
