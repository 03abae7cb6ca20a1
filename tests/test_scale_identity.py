"""Each kind of source ends as the same regions with the captions of the model alone."""

import pytest
import scale_identity

ray = pytest.importorskip("ray")
pytest.importorskip("datasets")
IMAGES = 20


@pytest.fixture(scope="module")
def expected():
    """Starts Ray once for all kinds, and captions without it."""
    ray.init(
        num_cpus=2, include_dashboard=False, object_store_memory=200 << 20, log_to_driver=False
    )
    drawn = scale_identity.draw(IMAGES)
    yield drawn, scale_identity.expected_captions(drawn)
    ray.shutdown()


@pytest.mark.slow
@pytest.mark.parametrize("kind", scale_identity.KINDS)
def test_every_region_of_a_source_is_captioned_once_as_by_the_model_alone(kind, expected, tmp_path):
    drawn, captions = expected
    assert captions.total() == scale_identity.REGIONS * IMAGES
    source = scale_identity.write(kind, tmp_path / "in", drawn)
    assert scale_identity.captioned(source, tmp_path / "out") == captions
