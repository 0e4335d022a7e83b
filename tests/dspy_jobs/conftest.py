import pytest
import torch


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """More only get in each other's way on models this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
