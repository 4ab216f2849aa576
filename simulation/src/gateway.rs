//! A gateway: the real table, its writes carried out on the real words. A start of the daemon forgets everything.

use std::{collections::BTreeMap, net::Ipv4Addr};

use gateway_ebpf::{SwitchWord, UserWord, words::Selector};
use handover_gateway::{
    mac::Mac,
    table::{
        HoldFigures, Refusal, Release, Retired, StageAnswer, StageStep, SwitchAnswer, SwitchStep, Table,
        Write,
    },
};

use crate::{
    mutation::Mutation,
    sim::{Answer, Ev, Failed, GatewayView, MS, Msg, Reply, Sim},
};

/// The service's address.
const V: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 10);

/// Who is staged with what: what a switch has to name again.
type Staged = BTreeMap<String, (Vec<String>, String)>;

pub(crate) struct Gateway {
    pub(crate) up: bool,
    pub(crate) boot: u32,
    pub(crate) table: Table,
    users: BTreeMap<u32, UserWord>,
    switches: BTreeMap<u16, SwitchWord>,
    slots: BTreeMap<Mac, u32>,
    staged: Staged,
}

impl Gateway {
    pub(crate) fn new() -> Self {
        Self {
            up: true,
            boot: 0,
            table: Table::new(16),
            users: BTreeMap::new(),
            switches: [(0, SwitchWord::REST)].into(),
            slots: BTreeMap::new(),
            staged: Staged::new(),
        }
    }

    /// The data path is loaded again at the next start; it forwards nothing until it is told who is where.
    pub(crate) fn die(&mut self) {
        *self = Self { up: false, boot: self.boot + 1, ..Self::new() };
    }

    fn write(&mut self, writes: &[Write]) {
        for write in writes {
            match *write {
                Write::UserWord { slot, word } => {
                    self.users.insert(slot, word);
                }
                Write::Switch { index, word } => {
                    self.switches.insert(index, word);
                }
                Write::AddUser { known_by, slot } => {
                    self.slots.extend(known_by.mac.map(|mac| (mac, slot)));
                }
                Write::RemoveUser { known_by } => {
                    known_by.mac.map(|mac| self.slots.remove(&mac));
                }
                _ => {}
            }
        }
    }

    /// The network a user's frames go to, as the program would find it; `None`: they are dropped.
    pub(crate) fn network_of(&self, user: &str) -> Option<&str> {
        let mac = self.table.users().find(|u| u.name == user)?.spec.mac?;
        let word = self.users.get(self.slots.get(&mac)?)?;
        let switch = self.switches.get(&u16::try_from(word.switch()).ok()?)?;
        let index = word.select(*switch)?.network;
        self.table
            .networks()
            .map(|n| n.name)
            .find(|name| self.table.network(name).is_some_and(|n| n.index == index))
    }

    pub(crate) fn view(&self) -> GatewayView {
        GatewayView {
            boot: self.boot,
            revision: self.table.revision(),
            users: self.table.users().map(|u| (u.name.into(), u.network.into())).collect(),
            switched: self
                .table
                .switches()
                .filter(|s| s.state == "switched")
                .map(|s| s.migration.to_owned())
                .collect(),
        }
    }
}

fn refused<T>(refusal: &Refusal) -> Result<T, Failed> {
    Err(Failed::Refused(refusal.to_string()))
}

impl Sim {
    pub(crate) fn ask_gateway(&mut self, g: usize, call: u64, msg: Msg) {
        let reply = match msg {
            Msg::Stage { id, users, from, to } => match self.stage(g, call, &id, &users, &from, &to) {
                Some(reply) => reply,
                None => return,
            },
            Msg::Status => Ok(Answer::Status(self.gateways[g].view())),
            Msg::Configure(desired) => match self.gateways[g].table.configured(&desired) {
                Ok((next, writes, retired)) => {
                    self.gateways[g].table = next;
                    self.gateways[g].write(&writes);
                    self.retire(g, retired);
                    Ok(Answer::Done)
                }
                Err(r) => refused(&r),
            },
            Msg::CheckSwitch { id, users, from, to } => {
                let errors = self.gateways[g].table.check(&id, &users, &from, &to).len();
                Ok(Answer::Looked { errors })
            }
            Msg::Switch { id, switch, generation, users, to } => {
                self.switch(g, &id, switch, generation, &users, &to)
            }
            Msg::Hold { id, switch, generation } => self.hold(g, &id, switch, generation),
            Msg::Unstage { id } => self.unstage(g, &id),
            Msg::Finish { id } => self.finish(g, &id),
            other => Err(Failed::Refused(format!("{other:?} is nothing to ask a gateway"))),
        };
        self.answer(call, reply);
    }

    fn stage(
        &mut self,
        g: usize,
        call: u64,
        id: &str,
        users: &[String],
        from: &str,
        to: &str,
    ) -> Option<Reply> {
        match self.gateways[g].table.stage_begin(id, users, from, to) {
            Ok(StageStep::Done(answer)) => Some(Ok(self.ticket(answer))),
            Ok(StageStep::Introduce { .. }) => {
                self.gateways[g].staged.insert(id.into(), (users.to_vec(), to.into()));
                let boot = self.gateways[g].boot;
                let wait = self.rng.range(200, 30 * MS);
                self.after(wait, Ev::Introduced { gateway: g, boot, id: id.into(), call });
                None
            }
            Err(r) => Some(refused(&r)),
        }
    }

    fn ticket(&self, answer: StageAnswer) -> Answer {
        let generation = if self.has(Mutation::GenerationReused) { 1 } else { answer.generation };
        Answer::Ticket { switch: answer.switch.into(), generation }
    }

    pub(crate) fn introduced(&mut self, g: usize, id: &str, call: u64) {
        if self.healed.is_none() && self.rng.permille(20) {
            self.gateways[g].table.stage_failed(id);
            self.answer(call, Err(Failed::Refused("the router did not answer".into())));
            return;
        }
        let reply = match self.gateways[g].table.stage_write(id) {
            Ok((writes, answer)) => {
                self.gateways[g].write(&writes);
                Ok(self.ticket(answer))
            }
            Err(r) => refused(&r),
        };
        self.answer(call, reply);
    }

    fn switch(
        &mut self,
        g: usize,
        id: &str,
        switch: u32,
        generation: u64,
        users: &[String],
        to: &str,
    ) -> Reply {
        let (mut id, mut generation) = (id.to_owned(), generation);
        let (mut users, mut to) = (users.to_vec(), to.to_owned());
        if self.has(Mutation::GenerationReused)
            && let Some(s) = self.gateways[g].table.switches().find(|s| u32::from(s.index) == switch)
        {
            (id, generation) = (s.migration.to_owned(), s.generation);
            if let Some(staged) = self.gateways[g].staged.get(&id).cloned() {
                (users, to) = staged;
            }
        }
        match self.gateways[g].table.switch(&id, switch, generation, &users, &to) {
            Ok(SwitchStep::Store { index, word }) => {
                if !self.controller.asked_to_switch.contains(&id) {
                    self.violated(|| format!("gw{g} switches users of {id}, which nobody asked for"));
                }
                self.gateways[g].write(&[Write::Switch { index, word }]);
                self.gateways[g].table.switched(&id, SwitchAnswer::default());
                Ok(Answer::Done)
            }
            Ok(SwitchStep::Done(_)) => Ok(Answer::Done),
            Err(r) => refused(&r),
        }
    }

    fn hold(&mut self, g: usize, id: &str, switch: u32, generation: u64) -> Reply {
        match self.gateways[g].table.hold(id, switch, generation, V) {
            Ok(step) => {
                self.gateways[g].write(&[Write::Switch { index: step.index, word: step.word }]);
                Ok(Answer::Done)
            }
            Err(r) => refused(&r),
        }
    }

    /// What was held goes to one side before the switch ends there.
    fn release(&mut self, g: usize, id: &str, to: Selector) -> Result<(), Refusal> {
        if let Release::Drain { index, word, .. } = self.gateways[g].table.release(id, to)? {
            self.gateways[g].write(&[Write::Switch { index, word }]);
            self.gateways[g].table.released(id, HoldFigures::default());
        }
        Ok(())
    }

    fn unstage(&mut self, g: usize, id: &str) -> Reply {
        if self.committed(id) && self.gateways[g].table.switches().any(|s| s.migration == id) {
            self.violated(|| format!("gw{g} undoes the switch of {id} after COMMIT"));
        }
        if self.has(Mutation::GatewayForgetsUnknownAbort)
            && !self.gateways[g].table.switches().any(|s| s.migration == id)
        {
            return Ok(Answer::Done);
        }
        let released = self.release(g, id, Selector::A);
        match released.and_then(|()| self.gateways[g].table.abort(id)) {
            Ok(step) => {
                self.gateways[g].write(&step.writes);
                self.retire(g, step.retired);
                Ok(Answer::Done)
            }
            Err(r) => refused(&r),
        }
    }

    fn finish(&mut self, g: usize, id: &str) -> Reply {
        let known = self.gateways[g].table.switches().any(|s| s.migration == id);
        let session = id.strip_suffix("-again").unwrap_or(id);
        if known && !self.committed(session) {
            self.violated(|| format!("gw{g} finishes {id} without COMMIT"));
        }
        let released = self.release(g, id, Selector::B);
        match released.and_then(|()| self.gateways[g].table.finish(id)) {
            Ok((writes, retired)) => {
                self.gateways[g].write(&writes);
                self.retire(g, retired);
                Ok(Answer::Done)
            }
            Err(r) => refused(&r),
        }
    }

    fn retire(&mut self, g: usize, retired: Retired) {
        let boot = self.gateways[g].boot;
        let wait = self.rng.range(100, 20 * MS);
        self.after(wait, Ev::Reuse { gateway: g, boot, retired: Box::new(retired) });
    }
}
