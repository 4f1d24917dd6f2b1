"""docs/vision-tower.md is true: its Python runs, unchanged and in order, on tiny weights under the names it uses."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from aimv2.encoder import VisionConfig, VisionEncoder
from aimv2.exports import export_model
from aimv2.preprocessing import ProcessorConfig

DOC = Path(__file__).parents[1] / "docs" / "vision-tower.md"
TEXT = DOC.read_text(encoding="utf-8")
BLOCKS = list(re.finditer(r"^```python\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL))


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working directory with the weights, the language model, the images and the `llava` that the document names."""
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from tokenizers import Tokenizer, models, pre_tokenizers

    torch.manual_seed(0)
    config = VisionConfig(width=32, depth=3, heads=2, mlp_hidden=48, image_size=336)
    processing = ProcessorConfig(image_size=336, patch_size=14, mean=(0.5,) * 3, std=(0.5,) * 3)
    name = tmp_path / "apple" / "aimv2-large-patch14-336"
    export_model(VisionEncoder(config), name, config=config, processing=processing, format="transformers")
    vocabulary = {"?": 0, "what": 1, "is": 2, "this": 3}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path / "llama")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(vocabulary), **sizes)).save_pretrained(tmp_path / "llama")
    for file, (width, height) in {"cat.jpg": (400, 360), "wide.jpg": (500, 130)}.items():
        pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / file)
    for module in ("llava", "llava/model", "llava/model/multimodal_encoder"):
        (tmp_path / module).mkdir()
        (tmp_path / module / "__init__.py").touch()
    for module in ("llava/model/multimodal_encoder/builder.py", "llava/model/llava_arch.py"):
        (tmp_path / module).write_text("def build_vision_tower(vision_tower_cfg, **kwargs):\n    raise ValueError\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for module in [module for module in sys.modules if module.split(".")[0] == "llava"]:
        del sys.modules[module]


def test_every_snippet_runs(place):
    assert len(BLOCKS) >= 8
    names = {"__name__": "snippets"}
    for block in BLOCKS:
        above = TEXT.count("\n", 0, block.start(1))  # so that a traceback has the document's lines
        exec(compile("\n" * above + block[1], str(DOC), "exec"), names)
    from llava.model import llava_arch

    cfg = names["SimpleNamespace"](mm_vision_tower=names["name"])
    assert isinstance(llava_arch.build_vision_tower(cfg), names["AIMv2VisionTower"])


def test_paths_exist_and_lines_fit():
    for path in re.findall(r"(?:scripts|aimv2|configs)/\w+\.py", TEXT):
        assert (DOC.parents[1] / path).is_file(), path
    assert not [line for block in BLOCKS for line in block[1].splitlines() if len(line) > 120]
