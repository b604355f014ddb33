import torch, lastgood, time, shutil, statistics as st, logging, os
logging.getLogger("lastgood").setLevel(logging.ERROR)
d=os.environ.get("D","/tmp/gb"); shutil.rmtree(d,ignore_errors=True)
m=torch.nn.Sequential(*[torch.nn.Linear(1320,1320,bias=False) for _ in range(30)]).cuda()
o=torch.optim.AdamW(m.parameters(),fused=True)
x=torch.randn(16384,1320,device='cuda')
def step(n=1):
    for _ in range(n):
        m(x).square().mean().backward();o.step();o.zero_grad()
step(3);torch.cuda.synchronize()
n=sum(p.numel() for p in m.parameters())*12/2**20;print('state MiB',n)
t=time.perf_counter();step(10);torch.cuda.synchronize();one=(time.perf_counter()-t)/10;print('step ms',one*1e3)
k=max(1,int(.5/one))
with lastgood.Checkpointer(d,model=m,optimizer=o) as c:
    s=0
    base=[];sv=[];stall=[]
    for r in range(12):
        for mode in ('base','save'):
            torch.cuda.synchronize();t=time.perf_counter()
            for i in range(10):
                step(k)
                if i==0 and mode=='save':
                    s+=1;t1=time.perf_counter();h=c.save(s);stall.append(time.perf_counter()-t1)
            torch.cuda.synchronize();dt=time.perf_counter()-t
            (base if mode=='base' else sv).append(dt)
            if mode=='save': h.result()
    print('stall ms',[round(x*1e3,1) for x in stall])
    print('throughput ratio (median of paired)',st.median(b/a for a,b in zip(sv[1:],base[1:])))
    ratios=[b/a for a,b in zip(sv[1:],base[1:])];print('min/max',min(ratios),max(ratios))
    for ev in open(d+'/events.jsonl').read().splitlines()[-3:]: print(ev[:250])
t=time.perf_counter();torch.save({'m':m.state_dict(),'o':o.state_dict()},d+'/x.pt');print('torch.save',time.perf_counter()-t)
with lastgood.Checkpointer(d,model=m,optimizer=o) as c:
    t=time.perf_counter();c.restore();torch.cuda.synchronize();print('restore',time.perf_counter()-t)
t=time.perf_counter();torch.load(d+'/x.pt',map_location='cuda');torch.cuda.synchronize();print('torch.load',time.perf_counter()-t)
