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
def test_arrays_are_read_and_conditions_compared_on_any_mesh(kind):
    mesh = jax.make_mesh((4,), ("d",), axis_types=(kind,))
    x = jax.device_put(normal(8, 4), NamedSharding(mesh, P("d")))
    with jax.set_mesh(mesh):
        np.testing.assert_array_equal(processes.to_numpy(x), normal(8, 4))
        assert processes.is_true_everywhere(True, x)
        assert not processes.is_true_everywhere(False, x)
    assert processes.first_owner(x) == 0
    assert not processes.has_remote_parts(x)
