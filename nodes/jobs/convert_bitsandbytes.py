"""bitsandbytes' structure and ours, on a handle's file."""

from __future__ import annotations

from ...quant_core.checkpoint.source import Source
from ...quant_core.errors import counted, some_of
from ...quant_core.stored.layers import stored_layers
from ...quant_core.tools.bitsandbytes import export_bitsandbytes
from ...quant_core.tools.contents import holds_bitsandbytes, nothing_to_import
from ...quant_core.tools.migrate import migrate
from ...quant_core.tools.rewrite import Draft
from ..shared.detection import detect
from ..shared.handles import QuantizedHandle
from ..shared.progress import NodeProgress
from ..shared.run_tool import Outcome, Proposal, Tool, run_tool

NAME = "Convert bitsandbytes"
IMPORT, EXPORT = "import", "export"


def convert_structure(quantized: QuantizedHandle, direction: str, nested: bool, progress: NodeProgress) -> Outcome:
    """Raises QuantPressError: an export of layers that bitsandbytes has not, a file that is not a model.

    A file with nothing to import goes on as it is: behind the node ComfyUI's form is wanted, and a graph that opens
    one file today and another tomorrow should not break. An export cannot pass a file on: another program would not
    read it.
    """

    def build(src: Source) -> Proposal:
        if direction == EXPORT:
            return Proposal(export_bitsandbytes(src, nested=nested))
        if not holds_bitsandbytes(src):
            return Proposal(Draft(src).finish(), [nothing_to_import(src)])
        return Proposal(migrate(src), unloadable(src))

    return run_tool(quantized, Tool(NAME, {"direction": direction, "nested": nested}), progress, build)


def unloadable(src: Source) -> list[str]:
    """A warning where ComfyUI would not recognise the model, as layers are packed whose shape it looks at; else []."""
    wanted = detect(src.path, decoded=True)
    packed = [
        layer
        for layer, stored in stored_layers(src).items()
        if layer in wanted.fixed and stored.format.tensor_specs(stored.shape)[0].shape != stored.shape
    ]
    if not packed:
        return []
    return [
        f"warning: ComfyUI will not recognise the result as {wanted.model}: "
        f"{counted(len(packed), 'layer is', 'layers are')} packed whose shape it reads ({some_of(packed)}). Put "
        "Requantize behind it, with an 8-bit fallback: that stores them unpacked."
    ]
