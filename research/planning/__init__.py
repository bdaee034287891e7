"""How many replies an ensemble can write, before the machines are there: what runs cost, and a simulation of queues."""
