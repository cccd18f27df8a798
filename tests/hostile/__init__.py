"""Models, data and uses that go wrong in silence elsewhere: here they come out right, or with an error or a warning."""
