"""Two reports -> `GateResult`: is this run as good as the baseline?"""
