"""A defence as a service: FastAPI in front, replicas of the defence on Ray Serve behind.

The front reads, checks, watches and gathers what is asked; replicas answer in batches. What they share is the memory's
folder, which any number of processes read and write.
"""
