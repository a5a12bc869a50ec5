"""The order of the tests."""


def pytest_collection_modifyitems(items):
    """Tests that fork come first: a process whose autograd has threads cannot be forked."""
    items.sort(key=lambda item: item.get_closest_marker("forks") is None)
