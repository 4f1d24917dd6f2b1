"""What is the attentive probe's own: its layers, and heads that were trained elsewhere."""

import numpy as np
import pytest
import torch
from made_images import dataset
from made_probes import Told
from tiny_models import V2, random_encoder

from aimv2.evals.encoders import encoder_of
from aimv2.evals.probes.attentive_head import HeadError
from aimv2.evals.probes.attentive_probe import AttentiveProbe, PatchStreams
from aimv2.evals.session import Session
from aimv2.preprocessing import ProcessorConfig

PROTOCOL = AttentiveProbe(lrs=(1e-2,), weight_decays=(0.05,), epochs=8, warmup_epochs=1, batch_size=32)


def test_the_papers_settings():
    """AIMv2 (arXiv 2411.14402), appendix: attentive probing."""
    protocol = AttentiveProbe()
    assert protocol.lrs == (5e-5, 1e-4, 2e-4, 3e-4, 5e-4, 1e-3, 2e-3) and protocol.weight_decays == (0.05, 0.1)
    assert (protocol.epochs, protocol.warmup_epochs, protocol.batch_size) == (100, 5, 1024)
    assert (protocol.min_lr, protocol.clip, protocol.select_on) == (1e-5, 3.0, "held_out")


def test_streams_are_raw_blocks_and_the_output():
    model, images = random_encoder(V2), torch.randn(2, 3, 56, 56)
    encoder = encoder_of(model, ProcessorConfig(image_size=56, patch_size=14, mean=(0.5,) * 3, std=(0.5,) * 3))
    found = PatchStreams("output,-1,0-1")(encoder, images)
    with torch.no_grad():
        output, raw = model(images, output_hidden_states=True)
    torch.testing.assert_close(found["output"], output)
    torch.testing.assert_close(found[f"block_{V2.depth - 1:02d}"], raw[-1])
    torch.testing.assert_close(found["blocks_00-01"], (raw[0] + raw[1]) / 2)


def test_a_head_of_another_hand_is_evaluated_as_it_is(tmp_path):
    """The chosen head's own file gives its own numbers, and no training set is needed."""
    encoder, data = Told("random"), dataset(60, 33, classes=3)
    trained = PROTOCOL.run(encoder, data, Session(quiet=True))
    torch.save({f"head.{name}": tensor for name, tensor in trained.tensors.items()}, tmp_path / "head.pth")
    data.train = None
    again = AttentiveProbe(head=str(tmp_path / "head.pth")).run(encoder, data, Session(quiet=True))
    assert again.metrics == trained.metrics and again.samples == trained.samples
    assert again.details["selection"] == {"on": "nothing", "stream": "output", "head": str(tmp_path / "head.pth")}
    with pytest.raises(ValueError, match="are several"):
        AttentiveProbe(head=str(tmp_path / "head.pth"), layers="all").run(encoder, data, Session(quiet=True))
    with pytest.raises(HeadError, match="a head of 3 classes and width 12: expected 4 classes"):
        AttentiveProbe(head=str(tmp_path / "head.pth")).run(encoder, dataset(8, 8, 4), Session(quiet=True))


def test_the_head_kept_is_the_chosen_one():
    """Its weights, with the names of Apple's files, give the samples' predictions."""
    from aimv2.evals.probes.attentive_head import AttentiveHead

    encoder, data = Told("random"), dataset(60, 33, classes=3)
    outcome = PROTOCOL.run(encoder, data, Session(quiet=True))
    head = AttentiveHead(12, 2, 3).eval()
    head.load_state_dict(outcome.tensors)
    pixels = encoder.processor([data.test.image(row) for row in range(33)]).pixel_values
    with torch.no_grad():
        predictions = head(encoder.output(pixels).patches).argmax(dim=1).tolist()
    assert predictions == [sample["prediction"] for sample in outcome.samples]


@pytest.mark.parametrize("heads", [5, 7])
def test_attention_heads_that_do_not_fit(heads):
    with pytest.raises(ValueError, match=f"width 12 is not a multiple of the number of heads {heads}"):
        AttentiveProbe(heads=heads).run(Told("random"), dataset(), Session(quiet=True))


def test_warm_up_is_shorter_than_the_training():
    for warmup in (5, -1):
        with pytest.raises(ValueError, match=f"warmup_epochs {warmup} of 5 epochs"):
            AttentiveProbe(epochs=5, warmup_epochs=warmup)


def test_settings_that_would_ruin_a_training():
    wrong = {
        "clip": [0.0, -1.0, np.nan],
        "heads": [0, -2],
        "min_lr": [-1e-5, np.nan],
        "weight_decays": [(), (-0.1,), (np.nan,)],
    }
    for name, values in wrong.items():
        for value in values:
            with pytest.raises(ValueError, match=f"^{name} .*: expected"):
                AttentiveProbe(**{name: value})


def test_online_sees_new_images_in_each_epoch(monkeypatch):
    seen = []
    monkeypatch.setattr(
        "aimv2.evals.probes.attentive_sweep.AttentiveSweep.step",
        lambda self, x, labels, *_: seen.append(x.clone()) or torch.zeros(len(self.settings)),
    )
    for mode in ("online", "cached"):
        seen.clear()
        protocol = AttentiveProbe(mode=mode, epochs=2, warmup_epochs=0, select_on="test")
        outcome = protocol.run(Told("random"), dataset(20, 6), Session(quiet=True))
        assert outcome.details["mode"] == mode and np.shape(seen[0]) == (20, 4, 12)
        assert torch.equal(*seen) == (mode == "cached")
