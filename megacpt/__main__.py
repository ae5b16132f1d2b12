from megacpt.cli import main

main()
