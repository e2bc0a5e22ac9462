"""A pytest plugin for `tools.gpu`, which may not count on pytest-xdist: `--shard K/N` keeps every Nth test."""


def pytest_addoption(parser):
    parser.addoption("--shard", default="0/1", metavar="K/N", help="run tests K, K + N, K + 2N, …")


def pytest_collection_modifyitems(config, items):
    part, parts = map(int, config.getoption("--shard").split("/"))
    dropped = [item for k, item in enumerate(items) if k % parts != part]
    items[:] = items[part::parts]
    if dropped:
        config.hook.pytest_deselected(items=dropped)
