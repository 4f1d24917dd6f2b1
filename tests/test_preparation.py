"""What is asked of a run's folder before the run goes on in it."""

import json
from pathlib import Path

import pytest

from aimv2.config import ConfigError, load_config, to_json
from aimv2.preparation import prepare_run


def test_a_run_that_was_begun_before_settings_were_added_goes_on(tmp_path):
    """The first release's config.json, which had one objective and neither `init_from` nor native resolution."""
    tokenizer = Path(__file__).parents[1] / "tokenizers" / "shapes"
    config = load_config(Path(__file__).with_name("tiny_run.py"), [f"out={tmp_path}", f"data.tokenizer={tokenizer}"])
    saved = to_json(config)
    del saved["init_from"], saved["data"]["native"], saved["objective"]["type"]
    del saved["objective"]["vision"]["position_scale"]
    (tmp_path / "config.json").write_text(json.dumps(saved))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    prepare_run(config)
    assert json.loads((tmp_path / "config.json").read_text()) == to_json(config)
    del saved["objective"]["vision"]["positions"]  # what it has always had by default, but this one says otherwise
    (tmp_path / "config.json").write_text(json.dumps(saved))
    config.objective.vision.positions = "sincos"
    with pytest.raises(ConfigError, match=r'objective.vision.positions: saved "learned", now "sincos"$'):
        prepare_run(config)
