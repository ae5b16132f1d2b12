"""What each kind of event of the timeline does. A handler takes the session and the event; what it decides, it records in the session."""
