"""Any release that SAELens knows: location is the release, file the id of the SAE in it. Needs the extra `sae-lens`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from steerback.errors import SteerbackError
from steerback.targets.formats import Place
from steerback.targets.formats.saelens import convert
from steerback.targets.sae import Sae

if TYPE_CHECKING:
    from steerback.targets.target import SaeSource


def read(place: Place, source: SaeSource) -> Sae:
    """The SAE of a release, loaded by SAELens."""
    where = f"SAELens {source.location}/{source.file}"
    try:
        from sae_lens import SAE
    except ImportError as error:
        raise SteerbackError(
            f"{where}: needs SAELens ({error}); install it with: pip install 'steerback[sae-lens]'"
        ) from error
    if source.file is None:
        raise SteerbackError(f"{where}: say which SAE of the release, sae = {{file = ...}}")
    if source.revision is not None:
        raise SteerbackError(f"{where}: SAELens takes no revision; leave it out, or name the repository and its format")
    loaded = SAE.from_pretrained(source.location, source.file, device="cpu")
    tensors = {name: tensor.detach() for name, tensor in loaded.state_dict().items()}
    return convert(loaded.cfg.to_dict(), tensors, where, source.input_scale)
