"""Arrays in programs that run in several processes.

With `jax.distributed`, each process holds only its own part of an array that is sharded
over all devices. So `numpy.asarray` of such an array raises an error, and an array that
one process holds alone cannot be put on the devices of all processes by
`jax.device_put`. `to_numpy` and `put` do both. In one process they are `numpy.asarray`
and `jax.device_put`. `HostCopies` copies arrays to the host memory of one process.

Every process runs the same program. So all of them call these functions in the same
order, as they do with every computation on a sharded array. `Agreement` makes an error
of one process an error of all processes. Otherwise the others would wait for it.
"""

from jaxq.processes._agreement import Agreement as Agreement
from jaxq.processes._arrays import has_remote_parts as has_remote_parts
from jaxq.processes._arrays import put as put
from jaxq.processes._arrays import spans_processes as spans_processes
from jaxq.processes._arrays import to_numpy as to_numpy
from jaxq.processes._host_copies import HostCopies as HostCopies

__all__: list[str] = []
