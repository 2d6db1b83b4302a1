"""What a step costs: times on this machine, memory and traffic on a slice that is not there."""
