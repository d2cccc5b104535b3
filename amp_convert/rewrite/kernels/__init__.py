"""Law 5: capture costs nothing. What tracing made slower is put right after it.

Each module here is one pass over a graph that is about to run in inference, and says what it takes
for granted and what it keeps. `tuned_graph` has their order.
"""
