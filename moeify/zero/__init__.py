"""ZeRO: what is partitioned, and the engines that do it."""
