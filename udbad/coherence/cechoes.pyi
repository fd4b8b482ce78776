from udbad.coherence.echoes import Expected as Expected
