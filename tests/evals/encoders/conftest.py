import pytest
from small_encoders import ALL, write_encoder

from aimv2.evals.encoders import Encoder, open_encoder


@pytest.fixture(scope="session")
def spec_of(tmp_path_factory):
    """`spec_of(name)` -> the spec of that small encoder, written once."""
    folder, specs = tmp_path_factory.mktemp("encoders"), {}

    def spec(name: str) -> str:
        if name not in specs:
            specs[name] = write_encoder(name, folder)
        return specs[name]

    return spec


@pytest.fixture(params=ALL)
def encoder(request, spec_of) -> Encoder:
    """Each kind there is, opened anew."""
    return open_encoder(spec_of(request.param))
