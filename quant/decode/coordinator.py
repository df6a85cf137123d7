"""Host nodes by two words of memory that a GPU and a thread here both see: one asks for a node, the other calls it.

The card writes a node's number into `request` and waits until `done` has it; it clears `done` itself. A number below 0
ends the thread's work. No call goes through the driver, whose own thread takes 30 to 50 us to come where the stream had
been idle (FreeToken 0.2.1, kernel/csrc/cpu_moe/gpu_sync.h).
"""

from quant.simd.struct import address, atomic, i64, pointer, struct
from quant.target.jit import kernel
from quant.threads.atomics import atomic_add, atomic_load, atomic_store, call_1, pause

END = -1  # a request to end

# A C function void(int64), and its argument.
NODE = struct("CoordinatorNode", function=address, argument=i64)
MAILBOX = struct(
    "Mailbox",
    request=atomic,  # a node's number from 1 on, 0 for none
    done=atomic,  # the number of the node that was called last; 0 once the card has seen it
    served=atomic,  # nodes called so far
    stop=atomic,  # 1: end without being asked
    nodes=pointer(NODE),
)


@kernel("void(int64)")
def serve(mailbox):
    """Call what is asked for, until END."""
    m = MAILBOX(mailbox)
    while atomic_load(m.stop) == 0:
        number = atomic_load(m.request)
        if number == 0:
            pause()
        else:
            atomic_store(m.request, 0)
            if number < 0:
                return
            node = m.nodes[number - 1]
            call_1(node.function, node.argument)
            atomic_add(m.served, 1)
            atomic_store(m.done, number)


@kernel("void(int64)")
def count(address):
    """A node that only counts its calls, at an address: for timing what is around it."""
    atomic_add(address, 1)
