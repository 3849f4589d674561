import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def styled_chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """data that name styles and concepts, embeddings, and runs of a whole chain with a judge: see styled_data."""
    from styled_data import train_chain

    return train_chain(tmp_path_factory.mktemp("styled"))
