"""Privacy-conscious delegation: ask another model for help without telling it whom it helps."""
