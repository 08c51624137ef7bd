from rota import merge, per_person

print(merge([(0, 10), (10, 20), (30, 40)]), "and it should be [(0, 20), (30, 40)]")
print(per_person(["Ann: 22:00-06:00"]), "and it should be {'Ann': 480}")
