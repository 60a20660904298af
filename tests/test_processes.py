"""Arrays of several processes, as far as one process can check it.

tests/sharding/test_processes.py runs several processes.
"""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxq import processes
from tests.arrays import normal


@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto])
def test_arrays_are_read_on_any_mesh(kind):
    mesh = jax.make_mesh((4,), ("d",), axis_types=(kind,))
    x = jax.device_put(normal(8, 4), NamedSharding(mesh, P("d")))
    with jax.set_mesh(mesh):
        np.testing.assert_array_equal(processes.to_numpy(x), normal(8, 4))
    assert not processes.has_remote_parts(x)
    assert not processes.spans_processes(x)


def test_one_process_keeps_its_own_errors():
    with pytest.raises(KeyError), processes.Agreement(jax.devices(), "it failed"):
        raise KeyError("a")
    with processes.Agreement([], "it failed") as agreement:
        agreement.fingerprint = 1
