"""Path search in star graphs: the step out of the centre can only be chosen by looking at the far end."""
