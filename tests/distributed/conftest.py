from collections.abc import Iterator

import pytest

from tests.distributed.pool import Pool


@pytest.fixture(scope="session")
def on_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    """Return what runs a function on two ranks."""
    pool = Pool(tmp_path_factory.mktemp("ranks"))
    yield pool
    pool.close()
