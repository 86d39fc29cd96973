"""Calls of several threads at the same time."""

import threading


def in_threads(*calls):
    """Run the calls at the same time; return their results, or the errors that they raised."""
    results: list = [None] * len(calls)

    def run(index):
        try:
            results[index] = calls[index]()
        except Exception as error:
            results[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive(), "a call hangs"
    return results
